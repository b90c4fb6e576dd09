"""Which tile a kernel uses, as pure functions of the problem and the chip; no autotuning, no environment variables.

The entries come from a compile-only study (registers, stack, matrix instructions): two accumulators of
block_n x block_v float32 take ``2 * block_n * block_v / (32 * num_warps)`` registers a thread, and 128 is the most
that leaves room for the epilogue. Of those that compile well the cost model ranks (schedule.py): sm_90 takes a pair's
tile of 128 x 128, which reads 85 flops a byte from L2 where 64 x 128 reads 64, too few for what L2 delivers, and which
was the fastest of fourteen on an H100 (bench/NOTES.md; no other chip is measured); sm_100's rows run two programs a
multiprocessor, one's epilogue under the other's products.
tests/kernels/test_compile_matrix.py compiles each entry and holds that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

OPERATIONS = ("forward", "recompute")
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its problem. Sizes in elements; a row of a paired kernel is a pair."""

    block_n: int  # pairs of a paired kernel, rows of a plain one
    block_v: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 3
    group_n: int = 16  # row blocks that share a stretch of the vocabulary in L2
    maxnreg: int | None = None
    use_descriptors: bool = False  # bulk tensor copies; taken only where the operands' alignment permits

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "block_d", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"tile: expected a power of two for {name}, got {value}")


_BULK = {"use_descriptors": True}

# arch -> (operation, paired) -> tile, for 16-bit inputs.
_TILES_16BIT: dict[str, dict[tuple[str, bool], Tile]] = {
    "sm_80": {
        ("forward", True): Tile(64, 64, 64, num_warps=4, num_stages=3),
        ("forward", False): Tile(128, 64, 64, num_warps=4, num_stages=3),
        ("recompute", True): Tile(64, 64, 64, num_warps=4, num_stages=3),
        ("recompute", False): Tile(128, 64, 64, num_warps=4, num_stages=3),
    },
    "sm_90": {
        ("forward", True): Tile(128, 128, 64, num_warps=8, num_stages=3, **_BULK),
        ("forward", False): Tile(128, 256, 64, num_warps=8, num_stages=3, **_BULK),
        ("recompute", True): Tile(128, 128, 64, num_warps=8, num_stages=3, **_BULK),
        ("recompute", False): Tile(256, 128, 64, num_warps=8, num_stages=3, **_BULK),
    },
    "sm_100": {
        ("forward", True): Tile(128, 128, 64, num_warps=8, num_stages=3, **_BULK),
        ("forward", False): Tile(128, 128, 64, num_warps=4, num_stages=3, **_BULK),
        ("recompute", True): Tile(128, 128, 64, num_warps=8, num_stages=3, **_BULK),
        ("recompute", False): Tile(128, 128, 64, num_warps=4, num_stages=3, **_BULK),
    },
    "gfx942": {
        ("forward", True): Tile(128, 128, 32, num_warps=8, num_stages=2),
        ("forward", False): Tile(128, 128, 32, num_warps=8, num_stages=2),
        ("recompute", True): Tile(128, 128, 32, num_warps=8, num_stages=2),
        ("recompute", False): Tile(128, 128, 32, num_warps=8, num_stages=2),
    },
}

# With a softcap, tanh and its slope need registers beside the accumulators: the recomputing kernel takes half a tile.
_TILES_16BIT_SOFTCAP: dict[str, dict[tuple[str, bool], Tile]] = {
    "sm_90": {
        ("recompute", True): Tile(64, 64, 64, num_warps=4, num_stages=3, **_BULK),
        ("recompute", False): Tile(128, 64, 64, num_warps=4, num_stages=3, **_BULK),
    },
    "sm_100": {
        ("recompute", True): Tile(128, 64, 64, num_warps=8, num_stages=3, **_BULK),
        ("recompute", False): Tile(128, 128, 64, num_warps=8, num_stages=3, **_BULK),
    },
}

# A bias beside 128 x 128 leaves 168 bytes of the recomputing kernel on the stack, beside 64 x 128 none.
_TILES_16BIT_BIAS: dict[str, dict[tuple[str, bool], Tile]] = {
    "sm_90": {("recompute", True): Tile(64, 128, 64, num_warps=4, num_stages=3, **_BULK)},
    "sm_100": {("recompute", True): Tile(128, 64, 64, num_warps=8, num_stages=3, **_BULK)},
}

# Class weights or the largest column take one more load or reduction for each row: 70 to 550 bytes of stack on sm_100.
_TILES_16BIT_COLUMNS: dict[str, dict[tuple[str, bool], Tile]] = {
    "sm_90": {("recompute", True): Tile(64, 64, 64, num_warps=4, num_stages=3, **_BULK)},
    "sm_100": {
        ("forward", True): Tile(128, 64, 64, num_warps=8, num_stages=3, **_BULK),
        ("forward", False): Tile(128, 64, 64, num_warps=8, num_stages=4, **_BULK),
        ("recompute", True): Tile(128, 64, 64, num_warps=8, num_stages=3, **_BULK),
        ("recompute", False): Tile(128, 128, 64, num_warps=8, num_stages=3, **_BULK),
    },
}

# float32 products run on the ordinary cores: small tiles, one table for all chips.
_TILES_32BIT: dict[tuple[str, bool], Tile] = {
    ("forward", True): Tile(32, 64, 16, num_warps=4, num_stages=2),
    ("forward", False): Tile(64, 64, 16, num_warps=4, num_stages=2),
    ("recompute", True): Tile(32, 64, 16, num_warps=4, num_stages=2),
    ("recompute", False): Tile(64, 64, 16, num_warps=4, num_stages=2),
}


@lru_cache
def current_arch(device: torch.device | None = None) -> str:
    """``sm_80``, ``sm_90``, ... or ``gfx942``, ...; ``interpreter`` under TRITON_INTERPRET=1; ``cpu`` without a GPU."""
    if INTERPRETED:
        return "interpreter"
    if not torch.cuda.is_available() or (device is not None and device.type == "cpu"):
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def table_arch(arch: str) -> str:
    """The table's entry that serves ``arch``: chips without wgmma or tcgen05 (sm_8x, sm_12x) take sm_80's."""
    if arch.startswith("gfx"):
        return "gfx942"
    if not arch.startswith("sm_"):
        raise ValueError(f"arch: expected sm_*, gfx* or interpreter, got {arch!r}")
    capability = int(arch.removeprefix("sm_"))
    if capability < 90 or capability >= 120:
        return "sm_80"
    return "sm_90" if capability < 100 else "sm_100"


def choose_tile(
    operation: str,
    *,
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    arch: str,
    paired: bool,
    softcap: bool = False,
    bias: bool = False,
    columns: bool = False,
) -> Tile:
    """The tile for one kernel launch. ``num_rows`` counts pairs when ``paired``, rows otherwise; ``columns``: class
    weights or the largest column are asked for.

    Raises ValueError on an unknown operation or arch.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation: expected one of {', '.join(OPERATIONS)}, got {operation!r}")
    if arch == "interpreter":
        # A program costs Python time whatever its size, so few and large ones.
        return Tile(
            block_n=_power_of_two(num_rows, 16, 256),
            block_v=_power_of_two(vocab_size, 16, 512),
            block_d=_power_of_two(hidden_size, 16, 256),
        )
    if dtype == torch.float32:
        return _TILES_32BIT[operation, paired]
    family, kernel = table_arch(arch), (operation, paired)
    tables = (
        (columns, _TILES_16BIT_COLUMNS),
        (softcap, _TILES_16BIT_SOFTCAP),
        (bias, _TILES_16BIT_BIAS),
        (True, _TILES_16BIT),
    )
    return next(
        table[family][kernel] for wanted, table in tables if wanted and kernel in table.get(family, {})
    )


def choose_row_block(vocab_size: int, arch: str) -> int:
    """Columns that the stored schedule's kernel has in registers at a time: 8 a thread of its 8 warps, one load.

    At least one for each of AMD's 512 threads: a column held twice could be overwritten before it is read again.
    """
    return _power_of_two(vocab_size, 512, 4096 if arch.startswith("gfx") else 2048)


def choose_rank_block(rank: int) -> int:
    """Columns of low-rank factors in one step of their loop: from the 16 of a matrix instruction to 64."""
    return _power_of_two(rank, 16, 64)


def _power_of_two(size: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), least), most)


def programs_per_processor(tile: Tile) -> int:
    """Programs of ``tile`` that one multiprocessor holds at once."""
    return 2 if tile.num_warps <= 4 else 1


@lru_cache(maxsize=4096)  # the search takes 0.1 ms
def choose_num_splits(num_row_blocks: int, num_vocab_tiles: int, num_slots: int) -> int:
    """Into how many stretches the forward cuts the vocabulary.

    Minimises waves x tiles per program, where a wave is ``num_slots`` programs at once; the fewest splits win a tie.
    """
    best, best_cost = 1, math.inf
    distinct = {-(-num_vocab_tiles // splits) for splits in range(1, num_vocab_tiles + 1)}
    for tiles_per_split in sorted(distinct, reverse=True):
        num_splits = -(-num_vocab_tiles // tiles_per_split)
        if num_splits > 4 * num_slots:
            break
        cost = -(-num_row_blocks * num_splits // num_slots) * tiles_per_split
        if cost < best_cost:
            best, best_cost = num_splits, cost
    return best


def choose_slice_width(
    num_rows: int, vocab_size: int, itemsize: int, *, block_v: int, scratch_bytes: int | None
) -> int:
    """Columns of one dlogits slice, a multiple of ``block_v``: what ``scratch_bytes`` holds, at least one tile.

    By default 32 MiB (a slice is written once and read twice, so it should stay in L2), but at least 4096 columns,
    under which the products that follow lose speed, unless that is more than 192 MiB, and never the whole of a
    vocabulary of two tiles or more. Slices are made equal, so that the last is not a sliver.
    """
    num_tiles = -(-vocab_size // block_v)
    if scratch_bytes is None:
        row_bytes = num_rows * itemsize
        columns = min(max(32 * 2**20 // row_bytes, 4096), 192 * 2**20 // row_bytes)
        most = min(columns // block_v, -(-num_tiles // 2))
    else:
        most = scratch_bytes // (num_rows * itemsize) // block_v
    num_slices = -(-num_tiles // max(most, 1))
    return -(-num_tiles // num_slices) * block_v
