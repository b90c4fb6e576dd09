"""What ``make gpu`` runs: the GPU tests, then the benchmark of record, in a time budget; then their table.

It uses the Python that runs it and needs torch, triton, pytest and an NVIDIA GPU, but no git and no network.
Figures reach the output folder while they are measured, so being killed loses only the last few seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench import report
from bench.figures import OUT_OF_TIME, read_figures
from bench.machine import ROOT

DEFAULT_BUDGET_S = 520.0
_TEST_SHARE = 0.4  # of the budget, at most
_MARGIN_S = 15.0  # for starting Python, the last write and the table
_NO_TESTS = 5  # pytest's exit code when it collects nothing
# torch.compile takes most of a minute per shape: it is measured on the first shape only.
_FIRST = ("--shapes", "8192x128256x4096", "--dtype", "bfloat16")
_OTHERS = "ours:recompute,torch:eager,quack,liger,cce_exact,torch:1 GEMM,torch:3 GEMMs,torch:4 GEMMs"
_REST = ("--shapes", "record", "--skip-first", "--providers", _OTHERS)
_TOY = ("--shapes", "toy", "--providers", "ours,torch", "--device", "cpu", "--rounds", "2", "--provisional")


def run(command: Sequence[str], log: Path, timeout_s: float, env: Mapping[str, str]) -> int:
    """Run a Python module with its output in ``log``; its exit code, 124 if it ran out of time."""
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env),
                timeout=max(timeout_s, 1.0),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def tail(path: Path, num_lines: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the tests passed and our losses ran, 1 if not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines and logs")
    parser.add_argument("--budget-seconds", type=float, default=DEFAULT_BUDGET_S, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="the same path on a CPU at toy size")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "bench.gpu: no NVIDIA GPU that torch can use; --rehearse runs the path on a CPU", file=sys.stderr
        )
        return 2
    end = time.monotonic() + args.budget_seconds
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({"TRITON_INTERPRET": "1"} if args.rehearse else {})

    tests = ["pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    code = run(tests, out / "tests.txt", args.budget_seconds * _TEST_SHARE, env)
    print(tail(out / "tests.txt", 15))
    print(f"tests: exit code {code}" + (" (time budget spent)" if code == 124 else ""))
    failed = code not in ((0, _NO_TESTS) if args.rehearse else (0,))

    for number, options in enumerate([_TOY] if args.rehearse else [_FIRST, _REST], start=1):
        left = end - time.monotonic() - _MARGIN_S
        # The first shape is the one that must be there; it may take all but a third of the time.
        share = left if args.rehearse or number > 1 else left * 2 / 3
        command = ["bench.loss", *options, "--out", str(out), "--budget-seconds", f"{max(share, 1.0):.0f}"]
        log = out / f"bench{number}.txt"
        code = run(command, log, max(left, 1.0) + _MARGIN_S / 2, env)
        if code:
            print(f"{' '.join(command)}: exit code {code}\n{tail(log, 15)}")
            failed = True
    figures = read_figures(out)
    print(report.tables(figures))
    broken = [
        figure for figure in figures if figure.provider == "ours" and figure.error not in (None, OUT_OF_TIME)
    ]
    return int(failed or bool(broken))


if __name__ == "__main__":
    sys.exit(main())
