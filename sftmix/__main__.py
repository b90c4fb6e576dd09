"""``python -m sftmix``: the command line, also under torchrun."""

from sftmix.cli import main

main()
