"""What the compiled kernels do beside their products, instruction by instruction: ``python -m bench.sass``.

Each tile of sftmix_kernels/fused/configs.py is compiled (tests/kernels/aot.py) and disassembled. The flow graph gives
the main loop, the loop over tiles, and between them the tile's rest along its shortest path: what runs where no target
is inside. Nothing is timed: an instruction says how many cycles its warp waits after it, as the compiler scheduled it,
and each pipe takes a warp's instruction in a known number of cycles.

    python -m bench.sass                 the committed counts as a page
    python -m bench.sass --count         compile and count again, into bench/results/sass.json (minutes)
    python -m bench.sass --write         that page as bench/SASS.md
    python -m bench.sass --check         exit 1 if bench/SASS.md is another one
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.flow import Flow, Instruction
from bench.machine import ROOT

COUNTS = ROOT / "bench" / "results" / "sass.json"
PAGE = ROOT / "bench" / "SASS.md"
HIDDEN_SIZES = (576, 2048, 4096)
CANDIDATES = "candidate"
# 16-bit multiply-adds that a multiprocessor's tensor cores finish in a cycle, from the vendor's dense rates.
TENSOR_RATE = {"sm_80": 1024, "sm_90": 2048, "sm_100": 4096}
# What the programs of a multiprocessor share, in registers and bytes; a program takes 1 KiB beside its own.
REGISTERS, SHARED = 65536, {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
# Cycles of a scheduler's pipe for a warp's instruction: CUDA's programming guide, table of arithmetic throughputs.
PIPES = {"sm_80": {"fma": 2, "alu": 2, "mufu": 8}, "sm_90": {"fma": 1, "alu": 2, "mufu": 8}}
PIPES["sm_100"] = PIPES["sm_90"]
_FMA = re.compile(r"FADD|FMUL|FFMA|IMAD|FSWZADD")
_ALU = re.compile(
    r"FMNMX|FSEL|FSET|LOP3|PLOP3|ISETP|IADD|VIADD|VIMNMX|IMNMX|SEL|SHF|LEA|PRMT|P2R|R2P|F2F|F2I|I2F|MOV|POPC"
)
_PRODUCT = re.compile(r"HGMMA|HMMA|UTC\w*MMA")


def tally(run: Iterable[Instruction]) -> dict[str, Any]:
    """Instructions, cycles a warp waits in them, and how many of each name."""
    run = list(run)
    names = Counter(i.name.split(".")[0] if i.name[:4] != "MUFU" else i.name for i in run)
    return {
        "instructions": len(run), "stalls": sum(i.stall for i in run),
        "fma": sum(bool(_FMA.match(i.name)) for i in run), "alu": sum(bool(_ALU.match(i.name)) for i in run),
        "mufu": sum(i.name.startswith("MUFU") for i in run), "names": dict(names.most_common()),
    }  # fmt: skip


def count(text: str) -> dict[str, Any]:
    """Counts of one disassembled kernel.

    With products ``loop`` is a turn of the main loop and ``rest`` the remainder of a tile, along the shortest path
    through it; without a loop over tiles (a program a tile) that of the program. ``static`` are all its instructions,
    taken or not. Without products ``rest`` is a turn of each innermost loop: the passes over a row's blocks.

    Raises ValueError where no loop is found, or no way through it.
    """
    flow = Flow.read(text)
    loops = flow.loops()
    inner = {h: body for h, body in loops.items() if not any(o in body and o != h for o in loops)}

    def products(header: int) -> int:
        return sum(bool(_PRODUCT.match(i.name)) for b in loops[header] for i in flow.blocks[b])

    main = max((h for h in loops if products(h)), key=lambda h: (-len(loops[h]), products(h)), default=None)
    if main is None:
        passes = [flow.around(h, body) for h, body in inner.items()]
        long = [way for way in passes if any(i.name.startswith("MUFU") for b in way for i in flow.blocks[b])]
        if not long:
            raise ValueError("sass: expected a loop with products or exponentials, found none")
        return {"rest": tally(i for way in long for b in way for i in flow.blocks[b])}
    body = loops[main]
    outer = [(h, blocks) for h, blocks in loops.items() if blocks > body]
    everything = set(range(len(flow.blocks)))
    start, within = min(outer, key=lambda item: len(item[1])) if outer else (0, everything)
    ends = {start if outer else len(flow.blocks) - 1}
    leaving = ({after for b in body for after in flow.successors[b]} - body) & within
    rest = flow.shortest({start}, {main}, within) + flow.shortest(leaving, ends, within - body)
    return {
        "loop": {
            **tally(i for b in flow.around(main, body) for i in flow.blocks[b]),
            "products": products(main),
        },
        "rest": tally(i for b in rest for i in flow.blocks[b]),
        "static": sum(len(flow.blocks[b]) for b in within - body),
    }


def bound(line: dict[str, Any]) -> dict[str, Any]:
    """What a line of COUNTS allows: programs a multiprocessor, cycles beside the products, share of peak by D.

    ``cycles`` are those of a multiprocessor for one pair (or row) and column: the busiest of its schedulers' pipes and
    their issue, or where one program has it alone, what a warp waits if that is more. With two programs or more one's
    rest runs under another's products: a tile of each takes what the tensor cores need, what the pipes need, or a
    tile from end to end, whichever is longest.
    """
    arch, rest, warps = line["arch"], line["rest"], line["warps"] / 4
    per_warp = [rest["instructions"], *(rest[pipe] * cost for pipe, cost in PIPES[arch].items())]
    busy = warps * max(per_warp)
    alone = max(busy, rest["stalls"])
    if "loop" not in line:
        return {"cycles": busy / line["columns"]}
    registers = -(-line["registers"] // 8) * 8 * 32 * line["warps"]
    programs = min(REGISTERS // registers, SHARED[arch] // (line["shared"] + 1024))
    block_n, block_v, block_d = (int(size) for size in line["tile"].split("x"))
    step = (2 if line["paired"] else 1) * block_n * block_v * block_d / TENSOR_RATE[arch]
    shares = {}
    for size in HIDDEN_SIZES:
        steps = -(-size // block_d)
        ways = programs * steps * step, programs * busy, steps * max(step, line["loop"]["stalls"]) + alone
        shares[size] = ways[0] / max(ways)
    cycles = (alone if programs == 1 else busy) / (block_n * block_v)
    return {"programs": programs, "step": step, "cycles": cycles, "shares": shares}


def cycles(counts: dict[str, Any]) -> dict[tuple[str, str, bool], float]:
    """What sftmix_kernels/fused/schedule.py holds: cycles a pair or row and column, of the tables' plain tiles."""
    return {
        (line["arch"], line["operation"], line["paired"]): round(bound(line)["cycles"], 3)
        for line in counts["kernels"]
        if line["variant"] == "plain"
    }


HEAD = """# What the compiled kernels do beside their products

Written by `python -m bench.sass --count --write` from [results/sass.json](results/sass.json), triton {triton}; do not
edit. Nothing here was timed.

**Loop** is one turn of the main loop: its instructions, the cycles a warp waits in them by the compiler's own stall
counts, and the cycles its products keep the tensor cores busy. **Rest** is the remainder of a tile on its shortest
path, that of tiles without a target: a warp's instructions and waits, then how many multiply or add (fma), compare,
select or compute with integers (alu) and take an exponential or a reciprocal (mufu, an eighth of the rate). **Cycles**
are a multiprocessor's for one pair (or row) and column: the busiest pipe, or with one program a multiprocessor its
waits where they are more. **Share** is the most of the tensor cores' peak that this leaves at D = {sizes}:
one program has nothing to run under its rest, of two or more one's rest runs under another's products. What a bound
like this leaves out: waits for a tile's first operands, for shuffles and barriers, and L2, of which a smaller tile asks
more.
"""


def page(counts: dict[str, Any]) -> str:
    """SASS.md."""
    sizes = ", ".join(map(str, HIDDEN_SIZES))
    parts = [HEAD.format(triton=counts["triton"], sizes=sizes)]
    kinds = [(f"## {arch}: the tiles in use", arch, False) for arch in TENSOR_RATE]
    for title, arch, others in [*kinds, ("## sm_90: every tile that the tuner would time", "sm_90", True)]:
        lines = [
            line for line in counts["kernels"]
            if "loop" in line and line["arch"] == arch and (line["variant"] == CANDIDATES) == others
        ]  # fmt: skip
        parts.append("\n".join([title, "", *_table(lines)]) + "\n")
    return "\n".join(parts)


def _table(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| kernel | rows | variant | tile, warps, stages | programs | registers | stack | loop | rest "
        "| fma, alu, mufu | cycles | share |"
    )
    yield "|---|---|---|---|---:|---:|---:|---|---|---|---:|---|"
    for line in lines:
        found, loop, rest = bound(line), line["loop"], line["rest"]
        notes = "".join(f" {note}" for note in line["notes"])
        counted = [
            f"{loop['instructions']}, {loop['stalls']} of {found['step']:.0f}",
            f"{rest['instructions']}, {rest['stalls']}",
            ", ".join(str(rest[pipe]) for pipe in PIPES[line["arch"]]),
            f"{found['cycles']:.3f}",
            " ".join(f"{share:.2f}" for share in found["shares"].values()),
        ]
        yield (
            f"| {line['operation']} | {'pairs' if line['paired'] else 'rows'} | {line['variant']} "
            f"| {line['tile'].replace('x', ' x ')}, {line['warps']}, {line['stages']} | {found['programs']} "
            f"| {line['registers']} | {line['stack']}{notes} | {' | '.join(counted)} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__.split("\n")[0])
    parser.add_argument("--count", action="store_true", help="compile and count again")
    parser.add_argument("--write", action="store_true", help="write bench/SASS.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if bench/SASS.md is not of the counts")
    args = parser.parse_args(argv)
    if args.count:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tests.kernels.aot", "--sass"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    text = page(json.loads(COUNTS.read_text(encoding="utf-8")))
    if args.write:
        PAGE.write_text(text, encoding="utf-8")
    elif not args.check:
        print(text)
    elif PAGE.read_text(encoding="utf-8") != text:
        print("bench/SASS.md is not of its counts: run `python -m bench.sass --write`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
