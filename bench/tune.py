"""Time candidate tiles of the Triton kernels on this GPU and print rows for sftmix_kernels/fused/configs.py.

    python -m bench.tune [--shape 8192x128256x4096] [--dtype bfloat16] [--softcap 30] [--rounds 10]
    python -m bench.tune --rehearse         the same path on a CPU at toy size, in Triton's interpreter

The backward is timed without its library products, so that the tile alone decides. Every candidate is compiled first,
by ``--jobs`` processes at once, into Triton's cache. A candidate that does not compile or does not fit the chip is
printed with its error. The table takes the rows that a person copies; nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.machine import ROOT, device_name, versions
from bench.measure import Case, interleave
from bench.report import RESULTS
from bench.shapes import Shape, parse_shapes

if TYPE_CHECKING:
    from sftmix_kernels.fused import Tile

# block_n (pairs, or rows), block_v, block_d, warps, stages. Two accumulators of a pair take twice a row's registers.
SIZES = {
    True: ((64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3),
           (128, 128, 64, 8, 3), (128, 128, 32, 8, 2)),
    False: ((128, 64, 64, 4, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
            (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 32, 8, 2)),
}  # fmt: skip
COMPILED = RESULTS / "tile_candidates.json"
# On sm_90: what a tile may keep on the stack (spills move by up to 48 bytes between Triton's versions), and have.
MOST_STACK = 64
MOST_SHARED = 227 * 1024
TOY_SIZES = ((16, 16, 16, 4, 2), (16, 32, 16, 4, 2))
TOY_SHAPE = "16x64x32"


def sizes_of(paired: bool, *, bulk: bool, toy: bool = False) -> Iterator[Tile]:
    """Every size with pointers and, where the chip has them, with bulk copies."""
    from sftmix_kernels.fused import Tile

    for block_n, block_v, block_d, num_warps, num_stages in TOY_SIZES if toy else SIZES[paired]:
        for use_descriptors in (True, False) if bulk else (False,):
            yield Tile(
                block_n, block_v, block_d, num_warps=num_warps, num_stages=num_stages,
                use_descriptors=use_descriptors,
            )  # fmt: skip


def misfits(operation: str, paired: bool) -> dict[str, str]:
    """Tiles that are not worth device time on sm_90, with what the compiler said of them (COMPILED)."""
    found = {}
    for line in json.loads(COMPILED.read_text(encoding="utf-8"))["tiles"]:
        if (line["operation"], line["paired"]) != (operation, paired):
            continue
        reasons = [f"{line['stack']} bytes of stack"] if line["stack"] > MOST_STACK else []
        reasons += [f"{note}: wgmma serialised" for note in line["notes"]]
        reasons += ["no wgmma"] if not line["counts"]["wgmma"] else []
        reasons += [f"{line['shared']} bytes of shared memory"] if line["shared"] > MOST_SHARED else []
        if reasons:
            found[line["tile"]] = ", ".join(reasons)
    return found


def candidates(operation: str, paired: bool, *, bulk: bool, hopper: bool, toy: bool = False) -> list[Tile]:
    """The sizes to time; on a Hopper chip without its misfits."""
    left_out = misfits(operation, paired) if hopper else {}
    return [tile for tile in sizes_of(paired, bulk=bulk, toy=toy) if source(tile) not in left_out]


def source(tile: Tile) -> str:
    """``tile`` as configs.py spells it."""
    bulk = ", **_BULK" if tile.use_descriptors else ""
    sizes = f"{tile.block_n}, {tile.block_v}, {tile.block_d}"
    return f"Tile({sizes}, num_warps={tile.num_warps}, num_stages={tile.num_stages}{bulk})"


class Kernels:
    """One problem and a call of each operation with a given tile."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, *, paired: bool, softcap: float, device: str
    ) -> None:
        from sftmix_kernels.arguments import HeadOptions, Rows, Ways, make_call
        from sftmix_kernels.call import Kept, Upstream
        from sftmix_kernels.fused import fused_forward
        from sftmix_kernels.terms import coefficients

        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

        target = torch.randint(0, shape.V, (shape.N,), generator=generator, device=device)
        lam = torch.rand(shape.M if paired else 0, generator=generator, device=device)
        self.call, _ = make_call(
            normal(shape.N, shape.D, scale=1.0), normal(shape.V, shape.D, scale=2.0 / shape.D**0.5), target, None,
            HeadOptions(softcap or None), Rows(lam, mixup_weight=1.0), Ways(impl="fused"),
        )  # fmt: skip
        coef = coefficients(self.call)
        stats = fused_forward(self.call, coef.column)
        self.column, self.upstream = coef.column, Upstream(coef.row, coef.pair)
        self.kept = Kept(stats.row_carry, stats.pair_carry, stats.entropy)

    def run(self, operation: str, tile: Tile) -> None:
        """The backward's inputs need no gradient, so that it makes dlogits alone."""
        from sftmix_kernels.fused import fused_backward, fused_forward

        if operation == "forward":
            fused_forward(self.call, self.column, tile=tile)
        else:
            fused_backward(self.call, self.column, self.kept, self.upstream, tile=tile)


def _nothing() -> None:
    pass


def tune(shape: Shape, dtype: torch.dtype, *, softcap: float, rounds: int, device: str) -> Iterator[str]:
    """The lines to print: every candidate, fastest first, then the row of the fastest."""
    from sftmix_kernels.fused.configs import OPERATIONS

    bulk = device == "cuda" and not torch.version.hip and torch.cuda.get_device_capability() >= (9, 0)
    hopper = bulk and torch.cuda.get_device_capability()[0] == 9
    for operation in OPERATIONS:
        for paired in (True, False):
            kernels = Kernels(shape, dtype, paired=paired, softcap=softcap, device=device)
            tiles = candidates(
                operation, paired, toy=device == "cpu", bulk=bulk or device == "cpu", hopper=hopper
            )
            cases = [Case(source(tile), partial(kernels.run, operation, tile), _nothing) for tile in tiles]
            for _ in interleave(
                cases, rounds=rounds, warmup=1, device=device, deadline=time.monotonic() + 120
            ):
                pass
            timed = sorted((statistics.median(case.times_ms), case.name) for case in cases if case.times_ms)
            yield f"# {operation}, {'pairs' if paired else 'rows'}"
            yield from (f"#   {ms:9.3f} ms  {name}" for ms, name in timed)
            if hopper:
                left_out = misfits(operation, paired).items()
                yield from (f"#   not timed     {name}: {why} by the compiler" for name, why in left_out)
            yield from (f"#   failed        {case.name}: {case.error}" for case in cases if case.error)
            if timed:
                yield f"({operation!r}, {paired}): {timed[0][1]},  # {timed[0][0]:.3f} ms at {shape}"


def compile_share(share: str, shape: Shape, dtype: torch.dtype, *, softcap: float, device: str) -> None:
    """Run every N-th candidate from the I-th once, ``share`` being "I/N", so that Triton's cache holds it.

    A candidate that fails is left to :func:`tune`, which says so.
    """
    from sftmix_kernels.fused.configs import OPERATIONS

    first, step = map(int, share.split("/"))
    for paired in (True, False):
        kernels = Kernels(shape, dtype, paired=paired, softcap=softcap, device=device)
        tiles = [
            (operation, tile)
            for operation in OPERATIONS
            for tile in candidates(operation, paired, toy=device == "cpu", bulk=True, hopper=device == "cuda")
        ]
        for operation, tile in tiles[first::step]:
            with contextlib.suppress(Exception):
                kernels.run(operation, tile)


def compile_all(arguments: Sequence[str], jobs: int) -> None:
    """Share the candidates out over ``jobs`` processes and wait for them."""
    begin = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.tune", *arguments, "--share", f"{job}/{jobs}"], cwd=ROOT
        )
        for job in range(jobs)
    ]
    for process in running:
        process.wait()
    print(f"# compiled by {jobs} processes in {time.monotonic() - begin:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="8192x128256x4096", help="N x V x D; pairs are N / 2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU at toy size")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile before anything is timed")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # of one of these processes
    options = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(options)
    if args.rehearse and not os.environ.get("TRITON_INTERPRET"):  # it must be set before triton is imported
        command = [sys.executable, "-m", "bench.tune", *options]
        return subprocess.call(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.tune: no GPU that torch can use; --rehearse runs the path on a CPU", file=sys.stderr)
        return 2
    device = "cpu" if args.rehearse else "cuda"
    dtype = torch.float32 if args.rehearse else getattr(torch, args.dtype)
    ((shape, _),) = parse_shapes(TOY_SHAPE if args.rehearse else args.shape)
    if args.share:
        compile_share(args.share, shape, dtype, softcap=args.softcap, device=device)
        return 0
    if args.jobs > 1:
        compile_all(options, args.jobs)
    found = ", ".join(
        f"{name} {version}" for name, version in versions().items() if name in ("torch", "triton")
    )
    print(f"# {device_name(device)}; {found}; {str(dtype).removeprefix('torch.')}, softcap {args.softcap:g}")
    for line in tune(shape, dtype, softcap=args.softcap, rounds=args.rounds, device=device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
