"""The list of faults in mutations.py fits the code, the tests and README.md's table; it is run by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.mutations import MUTATIONS, ROOT, Mutation

TABLE = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
ROWS = [line.strip("| \n").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
COMPLAINTS = [row for row in ROWS if len(row) == 3 and row[0] != "complaint"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.complaint}: {m.what}")
def test_every_fault_fits_the_code_and_the_table(mutation: Mutation) -> None:
    complaint, what, test, edits = mutation
    for edit in edits:
        assert (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old) == 1, edit
        assert edit.old != edit.new
    (row,) = [row for row in COMPLAINTS if row[0].startswith(complaint)]
    assert what in row[2] and test.partition("::")[2].partition("[")[0] in row[1]


def test_every_row_of_the_table_has_a_fault_and_says_no_more() -> None:
    for complaint, _, column in COMPLAINTS:
        faults = [m.what for m in MUTATIONS if complaint.startswith(m.complaint)]
        assert faults and column == "; ".join(faults), complaint


def test_every_named_test_exists() -> None:
    tests = sorted({mutation.test for mutation in MUTATIONS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    found = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
