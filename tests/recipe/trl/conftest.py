"""Without the package trl, which needs Python 3.11, there is nothing to test here."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("trl") else ["test_*.py"]
