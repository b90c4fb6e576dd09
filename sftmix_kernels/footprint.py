"""Bytes that a call of the loss with gradients holds beside its inputs: a pure function of sizes, dtype and device.

    chunked     logits of a chunk and their float32 block, dhidden, float32 dweight; both gradients again on the way out
    stored      logits of a chunk, dhidden, float32 dweight; both gradients again on the way out
    recompute   nothing of size in the forward; one slice of dlogits, float32 dhidden, the gradients

The sizes of chunks and slices come from the functions that the engines use; their docstrings state the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .choice import IMPLEMENTATIONS, MEMORY_SHARE, SCHEDULES, stored_from
from .chunked.layer import WIDENED_BYTES, WIDENED_COLUMNS, product_dtype
from .chunked.scratch import DEFAULT_ROWS, PRODUCT_COLUMNS, choose_sizes, chunk_size, default_scratch

ROW_BYTES = 96  # of a row's statistics, coefficients and gradient terms, about


@dataclass(frozen=True)
class LossBytes:
    """What one call holds beside its inputs, in bytes.

    ``forward``: the most while the loss is computed; ``kept``: from then to its backward; ``backward``: the most in the
    backward, ``kept`` and the gradients that it gives included.
    """

    way: str  # "chunked", "stored", "recompute" or "reference"
    forward: int
    kept: int
    backward: int
    products: int  # units of 2 N V D flops, forward and backward


def loss_bytes(
    num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, *, num_pairs: int = 0, arch: str = "cpu",
    memory_bytes: int = 80 * 10**9, impl: str | None = None, schedule: str | None = None, dweight: bool = True,
) -> LossBytes:  # fmt: skip
    """Bytes of the loss of ``num_rows`` rows with gradients, the first ``2 num_pairs`` of them paired.

    ``arch`` is "cpu" or a GPU's ("sm_80", "sm_90", "sm_100"), of ``memory_bytes`` in all, of which the default bound of
    ``stored`` is a part. Raises ``ValueError`` for what ``sftmix_loss`` would refuse.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows: expected at least 0, got {num_rows}")
    if not 0 <= num_pairs <= num_rows // 2:
        raise ValueError(f"num_pairs: expected 0 to {num_rows // 2}, half of num_rows, got {num_pairs}")
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {impl!r}")
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)} or None, got {schedule!r}")
    impl = impl or ("chunked" if arch == "cpu" else "fused")
    if impl == "fused" and arch == "cpu":
        raise ValueError("impl: expected one that runs on a CPU ('chunked' does), got 'fused'")
    of_layer = vocab_size * hidden_size * dweight
    if impl == "reference":
        logits = 4 * num_rows * vocab_size
        return LossBytes("reference", 3 * logits, 2 * logits, 4 * logits + dtype.itemsize * of_layer, 3)
    if impl == "chunked":
        return _chunked(num_rows, num_pairs, vocab_size, hidden_size, dtype, arch, dweight)
    bound, stored = memory_bytes // MEMORY_SHARE, schedule == "stored"
    if schedule is None:
        least = stored_from(vocab_size, hidden_size, dtype, arch, (True, dweight, False, False, False), bound)
        stored = least >= 0 and num_rows >= least
    if stored:
        return _stored(num_rows, num_pairs, vocab_size, hidden_size, dtype, dweight, bound)
    return _recompute(num_rows, vocab_size, hidden_size, dtype, arch, dweight)


def _chunked(
    num_rows: int, num_pairs: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, arch: str, dweight: bool
) -> LossBytes:  # fmt: skip
    device = "cpu" if arch == "cpu" else "cuda"
    made = product_dtype(dtype, torch.device("cpu")) if arch == "cpu" else dtype
    sizes = choose_sizes(
        num_rows, num_pairs, vocab_size, dtype=made, wide_dtype=torch.float32, device=device,
        scratch_bytes=default_scratch(device),
    )  # fmt: skip
    of_layer, rows = vocab_size * hidden_size * dweight, sizes.stored
    scratch = (sizes.stored * made.itemsize + sizes.wide * 4) * vocab_size
    # A chunk's hidden states, gathered and with 0 in rows without loss.
    scratch += rows * hidden_size * dtype.itemsize
    if made != dtype:
        least, most = WIDENED_COLUMNS
        columns = min(most, max(least, WIDENED_BYTES // (4 * hidden_size)), vocab_size)
        scratch += 2 * 4 * rows * hidden_size + 4 * columns * hidden_size
    elif dtype.itemsize < 4 and dweight:
        # A slice's product, beside the last one's.
        slices = 2 if vocab_size > PRODUCT_COLUMNS else 1
        scratch += slices * dtype.itemsize * hidden_size * min(vocab_size, PRODUCT_COLUMNS)
    of_rows = num_rows * hidden_size * dtype.itemsize
    kept = of_rows + 4 * of_layer + ROW_BYTES * num_rows
    # float32 gradients on a CPU are handed over themselves.
    again = 0 if dtype == torch.float32 and arch == "cpu" else of_rows + dtype.itemsize * of_layer
    return LossBytes("chunked", kept + scratch, kept, kept + again, 3)


def _stored(
    num_rows: int, num_pairs: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, dweight: bool, bound: int
) -> LossBytes:  # fmt: skip
    row_bytes = -(-vocab_size // 16) * 16 * dtype.itemsize
    of_layer, of_rows = vocab_size * hidden_size * dweight, num_rows * hidden_size * dtype.itemsize
    budget = max(2 * row_bytes, min(bound - 4 * of_layer, DEFAULT_ROWS * row_bytes))
    rows = max(
        2 * chunk_size(num_pairs, 2 * row_bytes, budget) if num_pairs else 0,
        chunk_size(num_rows - 2 * num_pairs, row_bytes, budget) if num_rows > 2 * num_pairs else 0,
    )
    kept = of_rows + 4 * of_layer + ROW_BYTES * num_rows
    forward = kept + rows * (row_bytes + 2 * hidden_size * dtype.itemsize)
    return LossBytes("stored", forward, kept, kept + of_rows + dtype.itemsize * of_layer, 3)


def _recompute(
    num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, arch: str, dweight: bool
) -> LossBytes:
    from .fused.configs import choose_slice_width
    from .fused.schedule import Sizes

    tile = Sizes(vocab_size, hidden_size, dtype, arch).tile("recompute", max(1, -(-num_rows // 2)))
    width = choose_slice_width(
        max(1, num_rows), vocab_size, dtype.itemsize, block_v=tile.block_v, scratch_bytes=None
    )
    of_rows = num_rows * hidden_size
    kept = of_rows * dtype.itemsize + ROW_BYTES * num_rows  # hidden itself
    slice_bytes = num_rows * min(width, vocab_size) * dtype.itemsize
    copies = of_rows * (4 if dtype.itemsize == 4 else 4 + dtype.itemsize)
    gradients = vocab_size * hidden_size * dweight * dtype.itemsize
    return LossBytes("recompute", kept, kept, kept + slice_bytes + copies + gradients, 4)
