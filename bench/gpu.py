"""What ``make gpu`` runs: the GPU tests, the benchmark of record and training steps, in a time budget; then tables.

    python -m bench.gpu --out FOLDER               all of it, as far as the budget reaches
    python -m bench.gpu --out FOLDER --part 1      tests; every row at the first shape, rows 10 and 11
    python -m bench.gpu --out FOLDER --part 2      row 8 at the other shapes of record
    python -m bench.gpu --out FOLDER --part 3      row 8 at the least and the most rows of the other heads

Rows are those of bench/targets.py; parts may share a folder, whose tables then hold what all of them measured.
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
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import report
from bench.figures import OUT_OF_TIME, read_figures
from bench.machine import ROOT

DEFAULT_BUDGET_S = 520.0
_TEST_SHARE = 0.4  # of the budget, at most
_MARGIN_S = 15.0  # for starting Python, the last write and the table
_NO_TESTS = 5  # pytest's exit code when it collects nothing
_MOST_WORKERS = 12  # each has a context of its own on the GPU, about half a GB
# torch.compile takes most of a minute per shape: it is measured on the first shape only.
_FIRST = ("bench.loss", "--shapes", "8192x128256x4096", "--dtype", "bfloat16", "--errors")
_STEPS = ("bench.train",)
_OTHERS = "ours:recompute,ours:stored,torch:1 GEMM,torch:3 GEMMs,torch:4 GEMMs,quack,liger:default"
_REST = ("bench.loss", "--shapes", "record", "--skip-first", "--providers", _OTHERS, "--rounds", "5")
_ENDS = ("bench.loss", "--shapes", "ends", "--providers", _OTHERS, "--rounds", "5")
# Part → its runs, each with the share of the time left that it may take.
_PARTS: dict[int, tuple[tuple[tuple[str, ...], float], ...]] = {
    0: ((_FIRST, 0.6), (_STEPS, 0.3), (_REST, 1.0)),
    1: ((_FIRST, 0.75), (_STEPS, 1.0)),
    2: ((_REST, 1.0),),
    3: ((_ENDS, 1.0),),
}
_ON_CPU = ("--device", "cpu", "--rounds", "2", "--provisional")
_TOY = (
    "bench.loss",
    "--shapes",
    "toy",
    "--errors",
    "--providers",
    "ours,torch,quack,liger,cce_exact",
    *_ON_CPU,
)
_TOY_STEPS = ("bench.train", "--models", "toy", "--dtype", "float32", *_ON_CPU)
_REHEARSAL = ((_TOY, 0.7), (_TOY_STEPS, 1.0))


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


def _workers() -> list[str]:
    """Compiling takes most of the tests' time: by several processes where pytest-xdist is there."""
    count = min((os.cpu_count() or 1) - 2, _MOST_WORKERS)
    return ["-n", str(count)] if count > 1 and find_spec("xdist") else []


def tail(path: Path, num_lines: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the tests passed and our losses ran, 1 if not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines and logs")
    parser.add_argument("--budget-seconds", type=float, default=DEFAULT_BUDGET_S, help="for everything")
    parser.add_argument("--part", type=int, default=0, choices=sorted(_PARTS), help="default: all of it")
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

    failed = False
    if args.part < 2:
        tests = ["pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider", *_workers()]
        code = run(tests, out / "tests.txt", args.budget_seconds * _TEST_SHARE, env)
        print(tail(out / "tests.txt", 15))
        print(f"tests: exit code {code}" + (" (time budget spent)" if code == 124 else ""))
        failed = code not in ((0, _NO_TESTS) if args.rehearse else (0,))

    for number, (options, part) in enumerate(_REHEARSAL if args.rehearse else _PARTS[args.part], start=1):
        left = end - time.monotonic() - _MARGIN_S
        command = [*options, "--out", str(out), "--budget-seconds", f"{max(left * part, 1.0):.0f}"]
        log = out / f"bench{args.part}-{number}.txt"
        code = run(command, log, max(left, 1.0) + _MARGIN_S / 2, env)
        absent = [line for line in tail(log, 30).splitlines() if line.startswith("not measured: ")]
        print("\n".join(absent))
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
