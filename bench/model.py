"""Predict the benchmark on a GPU that is not here: ``python -m bench.model``.

Every call of ours that bench.loss times is traced on meta tensors (bench/trace.py): its products, launches, bytes and
peak are counts of the code itself. Seconds come from the roofline of sftmix_kernels/fused/schedule.py, whose chip
constants are figures of others. Peers are taken from published figures, where there are any.

    python -m bench.model                        the prediction, one shape after the other, and the numbered rows
    python -m bench.model --results FOLDER       the same beside the GPU figures measured there
    python -m bench.model --write | --check      bench/NOTES.md's section, rewritten or compared
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from bench import targets
from bench.figures import Figure, newest, read_figures
from bench.machine import ROOT
from bench.problem import Problem
from bench.providers import Provider, choose, directions
from bench.report import rewritten
from bench.shapes import SHAPE_SETS, Shape, parse_shapes
from bench.trace import Event, Trace, on_chip, trace_call

NOTES = ROOT / "bench" / "NOTES.md"
BEGIN = "<!-- predicted: written by `python -m bench.model --write`, do not edit -->"
END = "<!-- end of predicted -->"
ARCH = "sm_90"
SPECS = "ours:recompute,ours:stored,torch:1 GEMM,torch:3 GEMMs,torch:4 GEMMs"
ROW_KERNELS = [f"_sftmix_{n}_kernel" for n in "prepare finish upstream scale gradient_terms".split()]
# Kernels that are a pass over memory: the bytes that their arguments say.
PASSES: dict[str, Callable[[dict[str, Any]], int]] = {
    **dict.fromkeys(ROW_KERNELS, lambda a: 64 * (a["num_rows"] + a["num_pairs"])),  # at most, of a row
    "_sftmix_fwd_combine_kernel": lambda a: 8 * a["num_splits"] * (a["num_rows"] + a["num_mixed"]),
    "_sftmix_round_kernel": lambda a: a["size"] * (a["gradient"][1] + a["out"][1]),
}
# H200, bfloat16, next-token loss forward and backward at V = 128256, D = 4096: Liger-Kernel pull request 1356.
PUBLISHED_MS = {
    "quack": {2048: 7.96, 4096: 16.78, 8192: 35.47, 16384: 73.7},
    "liger": {2048: 8.68, 4096: 16.71, 8192: 34.35, 16384: 73.7},
}
PUBLISHED_HEAD = (128256, 4096)


@dataclass(frozen=True)
class Counts:
    """What one call does: library products, kernels of ours, passes over memory, flops, bytes and its peak."""

    products: int
    kernels: int
    passes: int
    flops: int  # of library products and of our kernels' products
    bytes: int  # that device memory must move at least
    peak_bytes: int
    seconds: float


def _tile(arguments: dict[str, Any]) -> Any:
    from sftmix_kernels.fused import Tile

    names = {"block_n": "BLOCK_N", "block_v": "BLOCK_V", "block_d": "BLOCK_D", "group_n": "GROUP_N"}
    sizes = {name: arguments[key] for name, key in names.items()}
    return Tile(**sizes, num_warps=arguments["num_warps"], num_stages=arguments["num_stages"])


def kernel_cost(event: Event, arch: str) -> tuple[int, int, float]:
    """Flops, bytes through device memory and seconds of one launch of ours."""
    from sftmix_kernels.fused import schedule

    chip, a = schedule.CHIPS[schedule.table_arch(arch)], event.arguments
    planes = 2 if a.get("PAIRED") else 1
    if event.name in PASSES:
        moved = PASSES[event.name](a)
        return 0, moved, schedule.pass_s(chip, moved)
    if event.name == "_sftmix_stored_kernel":
        itemsize = a["logits"][1]
        moved = planes * event.sizes[0] * a["width"] * itemsize * 3
        work = schedule.epilogue_s(
            arch, "stored", columns=event.sizes[0] * a["vocab_size"], paired=planes == 2
        )
        return 0, moved, max(schedule.pass_s(chip, moved), work)
    tile, itemsize = _tile(a), a["weight"][1]
    rows, columns, inner = planes * a["num_rows"], a["vocab_size"], a["hidden_size"]
    is_forward = event.name == "_sftmix_fwd_kernel"
    moved = (schedule.weight_reads(tile, a["num_rows"]) * columns + rows) * inner * itemsize
    moved += 8 * a["part_max"][0][0] if is_forward else rows * columns * itemsize
    seconds = schedule.kernel_s(
        arch, tile, num_programs=event.sizes[0], tiles_per_program=a["tiles_per_split"] if is_forward else 1,
        hidden_size=inner, itemsize=itemsize, planes=planes, operation="forward" if is_forward else "recompute",
        memory_bytes=moved,
    )  # fmt: skip
    return 2 * rows * columns * inner, moved, seconds


def count(trace: Trace, arch: str) -> Counts:
    from sftmix_kernels.fused import schedule

    chip = schedule.CHIPS[schedule.table_arch(arch)]
    kinds = Counter(event.kind for event in trace.events)
    flops = moved = 0
    seconds = 0.0
    for event in trace.events:
        work, size, time = event.flops, event.bytes, 0.0
        if event.kind == "kernel":
            work, size, time = kernel_cost(event, arch)
        elif event.kind == "product":
            rows, columns, inner = event.sizes
            output_bytes = size - (rows + columns) * inner * event.itemsize
            time = schedule.product_s(
                chip, rows, columns, inner, itemsize=event.itemsize, output_bytes=output_bytes
            )
        else:
            time = schedule.pass_s(chip, size)
        flops, moved, seconds = flops + work, moved + size, seconds + time
    return Counts(kinds["product"], kinds["kernel"], kinds["pass"], flops, moved, trace.peak_bytes, seconds)


@lru_cache
def counts(shape: Shape, dtype: str, spec: str, task: str, direction: str, arch: str = ARCH) -> Counts:
    """Of one call that bench.loss would time, on a chip of ``arch``; nothing is computed."""
    from sftmix_kernels.fused.schedule import CHIPS, table_arch

    (provider,) = choose(spec)
    problem = Problem.on_meta(shape, dtype)
    call = provider.build(problem, task)

    def run() -> Any:
        if direction == "fwd" or task == "gemm":
            with torch.no_grad():
                return call()
        loss = call()
        loss.backward()
        return loss

    with on_chip(arch, CHIPS[table_arch(arch)].num_processors):
        return count(trace_call(run, problem.tensors, launching=False), arch)


def _figure(shape: Shape, dtype: str, **fields: Any) -> Figure:
    known = {"schedule": "", "lam": "", "extra_peak_bytes": None, "peak_bytes": None, **fields}
    return Figure(
        run_id="predicted", commit="", device=f"{ARCH}, predicted", versions={}, command="python -m bench.model",
        dtype=dtype, N=shape.N, V=shape.V, D=shape.D, M=shape.M, threads=0, rounds=0, ms_min=known["ms_median"],
        **known,
    )  # fmt: skip


def _predicted(shape: Shape, dtype: str, provider: Provider) -> Iterable[Figure]:
    for task in provider.tasks:
        for direction in directions(provider, task):
            found = counts(shape, dtype, provider.spec, task, direction)
            has_gradients = direction == "fwd_bwd" and task != "gemm"
            gradients = (shape.N + shape.V) * shape.D * getattr(torch, dtype).itemsize if has_gradients else 0
            yield _figure(
                shape, dtype, task=task, direction=direction, provider=provider.name, schedule=provider.schedule,
                ms_median=found.seconds * 1e3, peak_bytes=found.peak_bytes,
                extra_peak_bytes=max(0, found.peak_bytes - gradients), lam="row" if task == "sftmix" else "",
            )  # fmt: skip


def _published(shape: Shape, dtype: str) -> Iterable[Figure]:
    """Peers' next-token loss, and its sum with two on the mixed half of the rows."""
    if (shape.V, shape.D) != PUBLISHED_HEAD or dtype != "bfloat16":
        return
    for peer, ms in PUBLISHED_MS.items():
        if shape.N in ms:
            fields: dict[str, Any] = {"provider": peer, "schedule": "published", "direction": "fwd_bwd"}
            yield _figure(shape, dtype, task="ntp", ms_median=ms[shape.N], **fields)
            if shape.M in ms:
                yield _figure(shape, dtype, task="sftmix", ms_median=ms[shape.N] + 2 * ms[shape.M], **fields)


def predict(groups: Iterable[tuple[Shape, str]]) -> list[Figure]:
    figures: list[Figure] = []
    for shape, dtype in groups:
        for provider in choose(SPECS):
            figures += _predicted(shape, dtype, provider)
        figures += _published(shape, dtype)
    return figures


def counted_table(groups: Iterable[tuple[Shape, str]]) -> str:
    """Markdown: what one forward and backward of SFTMix does under each schedule, and what is chosen."""
    from sftmix_kernels.choice import MEMORY_SHARE
    from sftmix_kernels.fused.schedule import Sizes, choose_schedule

    lines = [
        "| N x V x D | call | products | kernels | passes | units | GB moved | extra MiB | ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape, dtype in groups:
        default = Sizes(
            shape.V, shape.D, getattr(torch, dtype), ARCH, scratch_bytes=141 * 10**9 // MEMORY_SHARE
        )
        chosen = choose_schedule(shape.N, default)
        unit = 2 * shape.N * shape.V * shape.D
        gradients = (shape.N + shape.V) * shape.D * getattr(torch, dtype).itemsize
        for schedule in ("recompute", "stored"):
            found = counts(shape, dtype, f"ours:{schedule}", "sftmix", "fwd_bwd")
            mark = " (default)" if schedule == chosen else ""
            lines.append(
                f"| {shape} | {schedule}{mark} | {found.products} | {found.kernels} | {found.passes} "
                f"| {found.flops / unit:.2f} | {found.bytes / 1e9:.1f} "
                f"| {(found.peak_bytes - gradients) / 2**20:.0f} | {found.seconds * 1e3:.3g} |"
            )
        stats = counts(shape, dtype, "ours:recompute", "stats", "fwd")
        lines.append(
            f"| {shape} | token_stats | {stats.products} | {stats.kernels} | {stats.passes} "
            f"| {stats.flops / unit:.2f} | {stats.bytes / 1e9:.1f} | {stats.peak_bytes / 2**20:.1f} "
            f"| {stats.seconds * 1e3:.3g} |"
        )
    return "\n".join(lines)


def tile_table(shape: Shape) -> str:
    """Markdown: predicted ms of the pairs' two kernels over the whole vocabulary, for bench.tune's bulk-copy tiles."""
    from bench import tune
    from sftmix_kernels.fused import schedule
    from sftmix_kernels.fused.configs import choose_num_splits, programs_per_processor

    chip, lines = schedule.CHIPS[ARCH], ["| tile of pairs | forward | recompute |", "|---|---:|---:|"]
    for tile in tune.sizes_of(True, bulk=True):
        cells = []
        for operation in ("forward", "recompute"):
            blocks, tiles = -(-shape.M // tile.block_n), -(-shape.V // tile.block_v)
            slots = chip.num_processors * programs_per_processor(tile)
            per_program = (
                -(-tiles // choose_num_splits(blocks, tiles, slots)) if operation == "forward" else 1
            )
            seconds = schedule.kernel_s(
                ARCH, tile, num_programs=blocks * -(-tiles // per_program), tiles_per_program=per_program,
                hidden_size=shape.D, itemsize=2, planes=2, operation=operation, memory_bytes=0,
            )  # fmt: skip
            misfit = tune.source(tile) in tune.misfits(operation, True)
            cells.append("misfit" if misfit else f"{seconds * 1e3:.3g}")
        if tile.use_descriptors:
            size = f"{tile.block_n} x {tile.block_v} x {tile.block_d}"
            lines.append(
                f"| {size}, {tile.num_warps} warps, {tile.num_stages} stages | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def section() -> str:
    """What bench/NOTES.md holds between the markers."""
    from sftmix_kernels.fused.schedule import CHIPS

    groups, chip = [(shape, "bfloat16") for shape in SHAPE_SETS["record"]], CHIPS[ARCH]
    constants = (
        f"{chip.name}: {chip.tensor_flops / 1e12:.0f} TFLOP/s in 16-bit library products, "
        f"{chip.memory_bytes / 1e12:.1f} TB/s of memory, {chip.l2_bytes / 1e12:.1f} TB/s of L2,\n"
        f"{chip.clock / 1e9:.3g} GHz, {chip.launch * 1e6:.0f} µs a launch; a Triton main loop at {chip.share:.0%} "
        "of the library's rate, and beside it the cycles of [SASS.md](SASS.md)."
    )
    tiles = f"Kernels of pairs at {groups[0][0]}, ms (misfit: left out by the compiler's report):"
    tables = counted_table(groups), targets.table(predict(groups)), tiles, tile_table(groups[0][0])
    return "\n\n".join((constants, *tables))


def confront(measured: Iterable[Figure]) -> str:
    """Predicted over measured, per figure of a GPU; CPU figures are never compared."""
    which = attrgetter("task", "direction", "provider", "schedule")
    figures = [f for f in newest(measured) if f.on_gpu and f.ms_median is not None and f.N % 2 == 0]
    if not figures:
        return "No GPU figures there: nothing to compare (CPU figures are of another machine)."
    lines = [
        "| device | N x V x D | figure | predicted ms | measured ms | ratio |",
        "|---|---|---|---:|---:|---:|",
    ]
    for figure in figures:
        shape = Shape(figure.N, figure.V, figure.D)
        same = [f for f in predict([(shape, figure.dtype)]) if which(f) == which(figure)]
        if same and same[0].ms_median and figure.ms_median:
            ratio = same[0].ms_median / figure.ms_median
            lines.append(
                f"| {figure.device} | {shape} | {figure.label} {figure.task} {figure.direction} "
                f"| {same[0].ms_median:.4g} | {figure.ms_median:.4g} | {ratio:.2f} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="record", help="comma list of toy, small, cpu, record, NxVxD")
    parser.add_argument("--results", type=Path, help="folder of figures to confront the prediction with")
    parser.add_argument("--write", action="store_true", help="rewrite the section of bench/NOTES.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if that section differs")
    args = parser.parse_args(argv)
    if args.write or args.check:
        page = NOTES.read_text(encoding="utf-8")
        wanted = rewritten(page, section(), BEGIN, END)
        if args.write:
            NOTES.write_text(wanted, encoding="utf-8")
        elif page != wanted:
            print("bench/NOTES.md is another one: run `python -m bench.model --write`", file=sys.stderr)
        return int(args.check and page != wanted)
    groups = [(shape, "bfloat16") for shape, _ in parse_shapes(args.shapes)]
    print(counted_table(groups), targets.table(predict(groups)), sep="\n\n")
    if args.results:
        print(f"\n{confront(read_figures(args.results))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
