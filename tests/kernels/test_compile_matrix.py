"""Every kernel, compiled ahead of time for nine chips, without one of them: registers, stack, matrix instructions.

Compiled here are one chip of each maker ("quick") and, as slow tests, sm_90 whole and a part of three others ("four
chips"); ``pytest tests/kernels/test_compile_matrix.py -s`` prints the table. That is done in processes of their own,
because here Triton interprets; a second run takes the kernels from Triton's cache. The rest is read from the committed
table, which ``python -m tests.kernels.aot --full`` writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton

from bench import sass, tune
from sftmix_kernels.fused import configs
from tests.kernels import aot

ROOT = Path(__file__).resolve().parents[2]
# What a default tile may keep on the stack: spills move by up to 48 bytes between Triton's versions.
MOST_STACK = 64
MAIN_KERNELS = ("_sftmix_fwd_kernel", "_sftmix_recompute_kernel")
OTHER_KERNELS = ("_sftmix_fwd_combine_kernel", "_sftmix_stored_kernel")
ARCHS = {"quick": aot.QUICK_ARCHS, "four chips": aot.ARCHS}
Line = dict[str, Any]


@pytest.fixture(scope="module", params=["quick", pytest.param("four chips", marks=pytest.mark.slow)])
def part(request: pytest.FixtureRequest) -> str:
    """Which part of the matrix is compiled."""
    return str(request.param)


@pytest.fixture(scope="module")
def matrix(part: str) -> list[Line]:
    """One line per compiled kernel."""
    options = ["--quick"] if part == "quick" else []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    parts = min(os.cpu_count() or 1, 8)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.aot", *options, "--part", f"{index}/{parts}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(parts)
    ]  # fmt: skip
    lines = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        lines += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    print_table(lines)
    return lines


def print_table(lines: list[Line]) -> None:
    print(
        f"\n{'kernel':26} {'case':52} {'tile':>11} {'w':>2} {'regs':>4} {'stack':>5} {'shared':>7}  instructions"
    )
    for line in sorted(lines, key=lambda line: (line["arch"], line["kernel"], line["case"])):
        counts = ", ".join(f"{count} {name}" for name, count in line["counts"].items() if count)
        row = (
            f"{line['kernel'].removeprefix('_sftmix_'):26} {line['case']:52} {line['tile']:>11} {line['warps']:>2} "
            f"{line['registers']:>4} {line['stack']:>5} {line['shared']:>7}  {counts} {' '.join(line['notes'])}"
        )
        print(row.rstrip())


def main_kernels(matrix: list[Line], **wanted: str) -> list[Line]:
    """Lines of the two kernels with products, controls aside."""
    lines = [
        line
        for line in matrix
        if line["kernel"] in MAIN_KERNELS and not line["variant"].startswith("control")
    ]
    lines = [line for line in lines if all(line[k] == v for k, v in wanted.items())]
    assert lines
    return lines


def control(matrix: list[Line], variant: str) -> Line:
    return next(
        line for line in matrix if line["variant"] == f"control-{variant}" and line["kernel"] in MAIN_KERNELS
    )


def test_the_kernels_compile_for_four_chips(part: str, matrix: list[Line]) -> None:
    compiled = {(line["arch"], line["kernel"], line["dtype"]) for line in matrix}
    dtypes = ("float32",) if part == "quick" else ("float16", "float32")
    for kernel in (*MAIN_KERNELS, *OTHER_KERNELS):
        assert {(arch, kernel, "bfloat16") for arch in ARCHS[part]} <= compiled
        assert {("sm_90", kernel, dtype) for dtype in dtypes} <= compiled


def test_no_spills_and_no_serialised_wgmma_on_sm_90(matrix: list[Line]) -> None:
    for line in matrix:
        if line["arch"] == "sm_90" and not line["variant"].startswith(("control", "ones")):  # V = D = 1
            assert line["stack"] <= MOST_STACK, line
            assert not line["notes"], line
    assert control(matrix, "128x128-w4")["stack"] > 10 * MOST_STACK and control(matrix, "128x128-w4")["notes"]


def test_sixteen_bit_inputs_use_the_matrix_units(part: str, matrix: list[Line]) -> None:
    instructions = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for arch in ARCHS[part]:
        for line in main_kernels(matrix, arch=arch, dtype="bfloat16"):
            assert line["counts"][instructions[arch]] > 0, line
    if part != "quick":
        assert all(line["counts"]["wgmma"] for line in main_kernels(matrix, arch="sm_90", dtype="float16"))
    assert control(matrix, "32x256")["counts"]["wgmma"] == 0


def test_bulk_copies_where_operands_are_aligned(part: str, matrix: list[Line]) -> None:
    for arch in ("sm_90",) if part == "quick" else ("sm_90", "sm_100"):
        for line in main_kernels(matrix, arch=arch, dtype="bfloat16"):
            assert (line["counts"]["bulk loads"] > 0) == (line["variant"] not in ("misaligned", "ones")), line


def test_float32_products_stay_ieee(matrix: list[Line]) -> None:
    for line in main_kernels(matrix, dtype="float32"):
        assert line["counts"]["tf32"] == 0 and line["counts"]["xf32"] == 0, line
    assert control(matrix, "tf32")["counts"]["tf32"] > 0


def test_no_compiler_folds_the_compensated_sum_away(part: str, matrix: list[Line]) -> None:
    """(a + b) - a is not b: beside the plain fold, float32's has the five operations of the error, rest and its end."""
    counts = {
        line["dtype"]: line["counts"]["float32 sums"]
        for line in matrix
        if line["case"].startswith("forward-pairs-sm_90-") and line["case"].endswith("-plain")
        and line["kernel"] == "_sftmix_fwd_combine_kernel"
    }  # fmt: skip
    assert counts["float32"] == counts["bfloat16"] + 7
    assert part == "quick" or counts["bfloat16"] == counts["float16"]


def test_the_stored_kernel_moves_sixteen_bytes_a_thread(part: str, matrix: list[Line]) -> None:
    """Also where V is odd, because its buffer's rows are padded; only the four label columns are stored alone."""
    lines = [line for line in matrix if line["kernel"] == "_sftmix_stored_kernel"]
    for line in lines:
        if line["variant"] != "ones" and line["arch"] != "gfx942":
            counts = line["counts"]
            runs = 2 if "-pairs-" in line["case"] else 1
            assert counts["16-byte loads"] >= 2 * runs and counts["16-byte stores"] >= runs, line
            assert counts["2-byte stores"] <= 4, line
    variants = {"ragged"} if part == "quick" else {"ragged", "smoothed-softcap", "bias"}
    assert variants <= {line["variant"] for line in lines}


@pytest.fixture(scope="module")
def table() -> list[Line]:
    lines: list[Line] = json.loads(aot.TABLE.read_text(encoding="utf-8"))["kernels"]
    return lines


def test_the_committed_table_holds_every_kernel_and_chip_and_is_of_these_tiles(
    table: list[Line], matrix: list[Line]
) -> None:
    found = {(line["arch"], line["kernel"], line["dtype"]) for line in table}
    for arch in (*aot.ARCHS, *aot.OTHER_ARCHS):
        for kernel in (*MAIN_KERNELS, *OTHER_KERNELS):
            assert {(arch, kernel, dtype) for dtype in ("bfloat16", "float16", "float32")} <= found
    tiles = {(line["case"], line["kernel"]): (line["tile"], line["warps"]) for line in table}
    for line in matrix:
        if not line["variant"].startswith("control"):
            assert tiles[line["case"], line["kernel"]] == (line["tile"], line["warps"]), (
                "write the table again"
            )


def test_the_committed_table_fits_every_chip(table: list[Line]) -> None:
    for line in table:
        assert line["shared"] <= aot.SHARED_LIMIT[line["arch"]], line
        assert line["stack"] <= MOST_STACK or line["variant"].startswith("ones"), line  # V = D = 1


def test_the_table_of_candidate_tiles_is_of_these_kernels(part: str, matrix: list[Line]) -> None:
    """bench.tune leaves tiles out by that table: where it holds what is compiled here, it is the same."""
    compiled = json.loads(tune.COMPILED.read_text(encoding="utf-8"))
    if compiled["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {compiled['triton']}")
    found = {(row["operation"], row["paired"], row["tile"]): row for row in compiled["tiles"]}
    kinds = (True,) if part == "quick" else (True, False)
    for operation, paired in ((o, p) for o in configs.OPERATIONS for p in kinds):
        row = found[operation, paired, tune.source(configs._TILES_16BIT["sm_90"][operation, paired])]
        case = aot.Case(operation, "sm_90", "bfloat16", paired).name
        (line,) = (line for line in main_kernels(matrix) if line["case"] == case)
        for what in ("registers", "stack", "shared", "counts"):
            assert row[what] == line[what], "run `python -m tests.kernels.aot --candidates`"


def test_the_committed_instructions_are_of_these_kernels(part: str, matrix: list[Line]) -> None:
    counts = json.loads(sass.COUNTS.read_text(encoding="utf-8"))
    if counts["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {counts['triton']}")
    known = {line["case"]: line for line in counts["kernels"] if line["variant"] != sass.CANDIDATES}
    counted = [line for line in matrix if "rest" in line]
    assert len(counted) >= (3 if part == "quick" else 20)
    for line in counted:
        for what in ("registers", "stack", "shared", "tile", "rest", "loop", "static"):
            assert known[line["case"]].get(what) == line.get(what), (
                "run `python -m bench.sass --count --write`"
            )
