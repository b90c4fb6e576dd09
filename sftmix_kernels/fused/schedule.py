"""Which schedule makes the gradients where the caller names none: a pure function of the problem and the chip.

Seconds of a schedule are the sum over its pieces, each bound by the slowest of what it needs:

    library product   max(flops / tensor rate of its waves of tiles, bytes / memory rate) + launch
    Triton kernel     max(products and epilogue, bytes / memory) + launch
                      products = max(flops / (share x tensor rate), bytes / L2)
                      one program a multiprocessor: products + epilogue
                      two, each under the other's products: max(products, products / 2 + epilogue)
    elementwise pass  bytes / memory rate + launch

The pieces are those of recompute.py and stored.py, their sizes from the functions that those use; bench/model.py
reads the same pieces off the running code, and a test compares. ``stored`` saves one product of four and pays traffic
that does not grow with N (float32 dweight), so it wins from some N on: :func:`stored_from`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..chunked.scratch import DEFAULT_ROWS, chunk_size
from .configs import (
    Tile,
    choose_num_splits,
    choose_slice_width,
    choose_tile,
    programs_per_processor,
    table_arch,
)


@dataclass(frozen=True)
class Chip:
    """What the cost model knows of a chip. Rates per second, all figures of others; bench/NOTES.md: how near."""

    name: str
    tensor_flops: float  # 16-bit products of the vendor's library, every multiprocessor busy
    float32_flops: float  # IEEE float32 products
    memory_bytes: float  # device memory, bytes read plus bytes written
    l2_bytes: float  # L2 to the multiprocessors
    clock: float  # cycles of a multiprocessor
    num_processors: int
    launch: float = 4e-6  # seconds from one kernel's end to the next one's start; an assumption
    share: float = 0.9  # of the library's rate that a Triton main loop reaches, epilogue aside; an assumption


# sm_90, H200: 769 to 798 TFLOP/s in an 8192 x 8192 x 8192 bfloat16 product of random numbers and 4.3 TB/s in a device
# copy, both through torch, are readings on such cards; that product's 2048 tiles of 128 x 256 fill 97 % of 16 waves.
# float32: datasheet. L2: 5120 bytes a clock (A100 white paper, table 4; H100's is as wide) at 1.755 GHz.
# The others, never confronted with one: 80 % of the datasheet's dense 16-bit rate, 90 % of its memory rate.
CHIPS = {
    "sm_80": Chip("A100 80 GB", 250e12, 19.5e12, 1.8e12, 7.2e12, 1.41e9, 108),
    "sm_90": Chip("H200", 788e12 / 0.97, 60e12, 4.3e12, 9.0e12, 1.755e9, 132),
    "sm_100": Chip("B200", 1800e12, 70e12, 7.2e12, 14e12, 1.85e9, 148),
    "gfx942": Chip("MI300X", 1040e12, 130e12, 4.8e12, 10e12, 2.1e9, 304),
}
# Output tiles of library products; the one that fills its waves best is taken to be the library's choice.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 192), (128, 128))
# Cycles of a multiprocessor for one pair, then for one row, and column, beside the products: counted in the compiled
# tiles by bench.sass (bench/SASS.md). On gfx942, which it cannot count, as on sm_80.
_CYCLES = {
    "sm_80": {"forward": (0.233, 0.089), "recompute": (0.334, 0.107), "stored": (0.474, 0.146)},
    "sm_90": {"forward": (0.195, 0.063), "recompute": (0.227, 0.068), "stored": (0.473, 0.146)},
    "sm_100": {"forward": (0.191, 0.063), "recompute": (0.231, 0.063), "stored": (0.459, 0.133)},
}
_CYCLES["gfx942"] = _CYCLES["sm_80"]


def epilogue_s(arch: str, operation: str, *, columns: int, paired: bool) -> float:
    """Seconds that ``columns`` pairs (or rows) times columns take beside the products, every multiprocessor busy."""
    chip, (pair, row) = CHIPS[table_arch(arch)], _CYCLES[table_arch(arch)][operation]
    return columns * (pair if paired else row) / (chip.clock * chip.num_processors)


def product_s(chip: Chip, rows: int, columns: int, inner: int, *, itemsize: int, output_bytes: int) -> float:
    """One library product [rows, inner] @ [inner, columns]; ``output_bytes`` counts reads of a sum too."""
    if itemsize >= 4:
        compute = 2 * rows * columns * inner / chip.float32_flops
    else:
        padded = min(
            math.ceil(math.ceil(rows / tall) * math.ceil(columns / wide) / chip.num_processors) * tall * wide
            for tall, wide in LIBRARY_TILES
        )
        compute = 2 * padded * chip.num_processors * inner / chip.tensor_flops
    moved = (rows + columns) * inner * itemsize + output_bytes
    return max(compute, moved / chip.memory_bytes) + chip.launch


def pass_s(chip: Chip, moved_bytes: float) -> float:
    """One elementwise pass."""
    return moved_bytes / chip.memory_bytes + chip.launch


def kernel_s(
    arch: str, tile: Tile, *, num_programs: int, tiles_per_program: int, hidden_size: int, itemsize: int,
    planes: int, operation: str, memory_bytes: float,
) -> float:  # fmt: skip
    """One launch of a kernel that makes logits. ``planes``: 2 where a row of the tile is a pair, else 1."""
    chip, programs = CHIPS[table_arch(arch)], programs_per_processor(tile)
    slots = chip.num_processors * programs
    tiles = math.ceil(num_programs / slots) * slots * tiles_per_program
    columns = tiles * tile.block_n * tile.block_v
    rate = chip.float32_flops if itemsize >= 4 else chip.tensor_flops
    loaded = (
        num_programs * tiles_per_program * (planes * tile.block_n + tile.block_v) * hidden_size * itemsize
    )
    products = max(2 * planes * columns * hidden_size / (rate * chip.share), loaded / chip.l2_bytes)
    epilogue = epilogue_s(arch, operation, columns=columns, paired=planes == 2)
    # A program alone takes up to twice its share of the multiprocessor for its epilogue: a warp a scheduler.
    compute = products + epilogue if programs == 1 else max(products, products / 2 + epilogue)
    return max(compute, memory_bytes / chip.memory_bytes) + chip.launch


def weight_reads(tile: Tile, num_rows: int) -> int:
    """How often a launch reads the weight from memory: GROUP_N row blocks at a time share each read through L2."""
    return math.ceil(math.ceil(num_rows / tile.block_n) / tile.group_n)


@dataclass(frozen=True)
class Sizes:
    """A problem without its number of rows."""

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    arch: str
    need_dhidden: bool = True
    need_dweight: bool = True
    scratch_bytes: int | None = None

    @property
    def chip(self) -> Chip:
        return CHIPS[table_arch(self.arch)]

    def tile(self, operation: str, num_pairs: int) -> Tile:
        return choose_tile(
            operation, num_rows=num_pairs, vocab_size=self.vocab_size, hidden_size=self.hidden_size,
            dtype=self.dtype, arch=self.arch, paired=True,
        )  # fmt: skip

    @property
    def dweight_bytes(self) -> int:
        """The float32 sum that ``stored`` keeps."""
        return 4 * self.vocab_size * self.hidden_size if self.need_dweight else 0

    @property
    def row_bytes(self) -> int:
        """A row of the stored schedule's buffer."""
        return math.ceil(self.vocab_size / 16) * 16 * self.dtype.itemsize

    @property
    def stored_budget(self) -> int | None:
        """Bytes for the stored schedule's chunk once the float32 dweight has its own; None without a bound."""
        return None if self.scratch_bytes is None else self.scratch_bytes - self.dweight_bytes


def _pieces(total: int, most: int) -> Iterator[tuple[int, int]]:
    """(size, how many) of the parts of ``total``, each ``most`` but for a remainder."""
    yield from ((size, count) for size, count in ((most, total // most), (total % most, 1)) if size and count)


def recompute_s(sizes: Sizes, num_rows: int) -> float:
    """Seconds of forward and backward by ``recompute``, all rows paired."""
    chip, V, D, item = sizes.chip, sizes.vocab_size, sizes.hidden_size, sizes.dtype.itemsize
    pairs = math.ceil(num_rows / 2)
    tile = sizes.tile("forward", pairs)
    blocks, tiles = math.ceil(pairs / tile.block_n), math.ceil(V / tile.block_v)
    splits = choose_num_splits(blocks, tiles, chip.num_processors * programs_per_processor(tile))
    per_split = math.ceil(tiles / splits)
    shared = {"hidden_size": D, "itemsize": item, "planes": 2}
    total = kernel_s(
        sizes.arch, tile, num_programs=blocks * math.ceil(tiles / per_split), tiles_per_program=per_split,
        operation="forward", memory_bytes=(weight_reads(tile, pairs) * V + num_rows) * D * item, **shared,
    )  # fmt: skip
    tile = sizes.tile("recompute", pairs)
    width = choose_slice_width(num_rows, V, item, block_v=tile.block_v, scratch_bytes=sizes.scratch_bytes)
    for columns, count in _pieces(V, width):
        moved = (weight_reads(tile, pairs) * columns + num_rows) * D * item + num_rows * columns * item
        seconds = kernel_s(
            sizes.arch, tile, num_programs=math.ceil(pairs / tile.block_n) * math.ceil(columns / tile.block_v),
            tiles_per_program=1, operation="recompute", memory_bytes=moved, **shared,
        )  # fmt: skip
        if sizes.need_dhidden:
            seconds += product_s(chip, num_rows, D, columns, itemsize=item, output_bytes=8 * num_rows * D)
        if sizes.need_dweight:
            seconds += product_s(chip, columns, D, num_rows, itemsize=item, output_bytes=columns * D * item)
        total += count * seconds
    if sizes.need_dhidden:  # zeros, and the sum in hidden's dtype
        total += pass_s(chip, 4 * num_rows * D) + pass_s(chip, (4 + item) * num_rows * D)
    return total


def stored_s(sizes: Sizes, num_rows: int) -> float:
    """Seconds of forward and backward by ``stored``, all rows paired."""
    chip, V, D, item = sizes.chip, sizes.vocab_size, sizes.hidden_size, sizes.dtype.itemsize
    budget = sizes.stored_budget or DEFAULT_ROWS * sizes.row_bytes
    pairs = math.ceil(num_rows / 2)
    total, written = 0.0, False
    for size, count in _pieces(pairs, chunk_size(pairs, 2 * sizes.row_bytes, budget)):
        rows, logits = 2 * size, 2 * size * sizes.row_bytes
        seconds = product_s(chip, rows, V, D, itemsize=item, output_bytes=logits)
        work = epilogue_s(sizes.arch, "stored", columns=size * V, paired=True)
        seconds += max(pass_s(chip, 3 * logits), work) + pass_s(
            chip, 2 * rows * D * item
        )  # and hidden's copy
        if sizes.need_dhidden:  # a pair's two runs of rows
            seconds += 2 * product_s(chip, size, D, V, itemsize=item, output_bytes=size * D * item)
        if sizes.need_dweight:
            added, first = (
                product_s(chip, V, D, rows, itemsize=item, output_bytes=b * V * D) for b in (8, 4)
            )
            seconds += added
            total, written = total if written else total + first - added, True
        total += count * seconds
    if sizes.need_dweight:  # the backward's product with the upstream gradient
        total += pass_s(chip, (4 + item) * V * D)
    if sizes.need_dhidden:
        total += pass_s(chip, (2 * item + (8 if item < 4 else 0)) * num_rows * D)
    return total


def _fits(sizes: Sizes) -> bool:
    """Whether the bound has room for the float32 dweight and a chunk of one pair."""
    return sizes.stored_budget is None or sizes.stored_budget >= 2 * sizes.row_bytes


# Numbers of rows at which the schedules are compared: four to the octave.
GRID = tuple(sorted({round(2 ** (k / 4)) // 2 * 2 for k in range(24, 65)}))


@lru_cache
def stored_from(sizes: Sizes) -> int | None:
    """The least number of rows (of :data:`GRID`) from which ``stored`` is the faster one; None: it never is.

    One number, and not a comparison of costs at each N, so that a traced call guards on one bound of N.
    """
    if sizes.arch in ("interpreter", "cpu") or not _fits(sizes):
        return None
    least = None
    for num_rows in reversed(GRID):
        if stored_s(sizes, num_rows) > recompute_s(sizes, num_rows):
            break
        least = num_rows
    return least


def choose_schedule(num_rows: int, sizes: Sizes) -> str:
    """``recompute`` or ``stored``, the faster by the cost model within ``sizes.scratch_bytes``.

    That bound, if any, must hold what ``stored`` keeps, float32 dweight [V, D] and a chunk of logits; ``recompute``,
    whose float32 dhidden [N, D] is not counted, serves where it does not, and in the interpreter.
    """
    least = stored_from(sizes)
    return "recompute" if least is None or num_rows < least else "stored"
