"""Every kernel, compiled ahead of time for four chips, without one of them: registers, stack, matrix instructions.

``pytest tests/kernels/test_compile_matrix.py -s`` prints the table. Compiled in processes of their own, because here
Triton interprets; a second run takes the kernels from Triton's cache.
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
ROOT = Path(__file__).resolve().parents[2]
# What a default tile may keep on the stack: spills move by up to 48 bytes between Triton's versions.
MOST_STACK = 64
MAIN_KERNELS = ("_sftmix_fwd_kernel", "_sftmix_recompute_kernel")
Line = dict[str, Any]


@pytest.fixture(scope="module")
def matrix() -> list[Line]:
    """One line per compiled kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    parts = min(os.cpu_count() or 1, 8)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.aot", "--part", f"{part}/{parts}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(parts)
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


def test_every_kernel_compiles_for_every_chip(matrix: list[Line]) -> None:
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        compiled = {(line["kernel"], line["dtype"]) for line in matrix if line["arch"] == arch}
        for dtype in ("bfloat16", "float16", "float32"):
            for kernel in (*MAIN_KERNELS, "_sftmix_fwd_combine_kernel"):
                assert (kernel, dtype) in compiled


def test_no_spills_and_no_serialised_wgmma_on_sm_90(matrix: list[Line]) -> None:
    for line in matrix:
        if line["arch"] == "sm_90" and not line["variant"].startswith("control"):
            assert line["stack"] <= MOST_STACK, line
            assert not line["notes"], line
    assert control(matrix, "128x128-w4")["stack"] > 10 * MOST_STACK and control(matrix, "128x128-w4")["notes"]


def test_sixteen_bit_inputs_use_the_matrix_units(matrix: list[Line]) -> None:
    expected = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for arch, instruction in expected.items():
        for dtype in ("bfloat16", "float16"):
            for line in main_kernels(matrix, arch=arch, dtype=dtype):
                assert line["counts"][instruction] > 0, line
    assert control(matrix, "32x256")["counts"]["wgmma"] == 0


def test_bulk_copies_where_operands_are_aligned(matrix: list[Line]) -> None:
    for arch in ("sm_90", "sm_100"):
        for line in main_kernels(matrix, arch=arch, dtype="bfloat16"):
            assert (line["counts"]["bulk loads"] > 0) == (line["variant"] not in ("misaligned", "ones")), line


def test_float32_products_stay_ieee(matrix: list[Line]) -> None:
    for line in main_kernels(matrix, dtype="float32"):
        assert line["counts"]["tf32"] == 0 and line["counts"]["xf32"] == 0, line
    assert control(matrix, "tf32")["counts"]["tf32"] > 0
