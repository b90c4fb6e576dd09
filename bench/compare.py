"""The portable loss before and after a change, interleaved in one run: ``python -m bench.compare REVISION``.

Two processes, one with this tree's package and one with the package of a git revision, take turns: each call is timed
by one and then by the other, so that a slow moment of the machine meets both. What is kept is the median of the ratios
after / before, and each side's median, with machine, versions and commits, in bench/results/compare.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.machine import ROOT, command_line, commit, device_name, versions

OUT = ROOT / "bench" / "results" / "compare.json"
# N, V, D, dtype, calls a turn: real sizes in both types, and small calls, which are all overhead.
CASES = (
    (1024, 49152, 576, "float32", 1),
    (1024, 49152, 576, "bfloat16", 1),
    (128, 4096, 64, "float32", 30),
    (8, 49152, 576, "bfloat16", 3),
)
TASKS = ("sftmix", "ntp", "stats")


def serve() -> None:
    """Time what each line of standard input asks for; a line of milliseconds a call."""
    import torch

    from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats

    made: dict[tuple[int, int, int, str], list[torch.Tensor]] = {}
    for line in sys.stdin:
        task, N, V, D, dtype, calls = json.loads(line)
        if (N, V, D, dtype) not in made:
            made.clear()
            g = torch.Generator().manual_seed(0)
            kind = getattr(torch, dtype)
            leaves = [torch.randn(s, generator=g).to(kind).requires_grad_() for s in ((N, D), (V, D))]
            made[N, V, D, dtype] = [
                *leaves,
                torch.randint(V, (N,), generator=g),
                torch.rand(N // 2, generator=g),
            ]
        hidden, weight, target, lam = made[N, V, D, dtype]
        started = time.perf_counter()
        for _ in range(calls):
            if task == "stats":
                token_stats(hidden, weight, target, impl="chunked")
                continue
            if task == "ntp":
                loss = linear_cross_entropy(hidden, weight, target, impl="chunked")
            else:
                loss = sftmix_loss(hidden, weight, target, lam, impl="chunked").loss
            torch.autograd.grad(loss, (hidden, weight))
        print(1000 * (time.perf_counter() - started) / calls, flush=True)


def ask(process: subprocess.Popen[str], request: list[object]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(folder: Path, rounds: int) -> list[dict[str, object]]:
    """A row a case and task: milliseconds of both sides and the median of the ratios."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; from bench.compare import serve; serve()"
    after, before = (
        subprocess.Popen(
            [sys.executable, "-c", code, str(root), str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=folder,
        )
        for root in (ROOT, folder)
    )  # fmt: skip
    rows: list[dict[str, object]] = []
    for case in CASES:
        for task in TASKS:
            pairs = [(ask(after, [task, *case]), ask(before, [task, *case])) for _ in range(rounds + 1)][1:]
            ratio = statistics.median(one / two for one, two in pairs)
            sides = [statistics.median(side) for side in zip(*pairs, strict=True)]
            N, V, D, dtype, _ = case
            row = {
                "task": task,
                "N": N,
                "V": V,
                "D": D,
                "dtype": dtype,
                "ms": sides[0],
                "ms_before": sides[1],
            }
            rows.append({**row, "ratio": ratio})
            times = f"{sides[1]:9.3f} -> {sides[0]:9.3f} ms, ratio {ratio:.3f}"
            print(f"{task:7} {N}x{V}x{D} {dtype:9} {times}", flush=True)
    for process in (after, before):
        process.kill()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("revision", help="git revision of the package before")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side per case")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.check_output(["git", "archive", args.revision, "sftmix_kernels"], cwd=ROOT)
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        rows = compare(Path(folder), args.rounds)
    head = {"device": device_name("cpu"), **versions(), "commit": commit(), "before": args.revision}
    asked = command_line("bench.compare", [args.revision, "--rounds", str(args.rounds)])
    record = {**head, "command": asked, "rows": rows}
    OUT.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
