"""Logits of a few given columns of each row, made beside the tiles, and their gradients' way into a slice of dlogits.

    z_nk = f(W[y_nk] h_n + up[y_nk] low_n + b[y_nk])

Products of gathered rows, in float32, a bounded number of them at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call

GATHERED_BYTES = 32 * 2**20  # of gathered rows at a time, where a call names no bound


def token_logits(call: Call) -> tuple[Tensor, Tensor]:
    """Final logits (N, K) of ``call.tokens`` and f' over the scale there, both float32; 0 where a token is -1.

    Memory: ``scratch_bytes`` or GATHERED_BYTES of gathered rows, at least one of each, and O(N K).
    """
    assert call.tokens is not None
    options, tokens = call.options, call.tokens.flatten()
    affine = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    width = call.hidden.shape[1] + (0 if call.low is None else call.low.shape[1])
    entry_bytes = width * (2 * call.hidden.element_size() + 8)
    size = max(1, (call.wanted.scratch_bytes or GATHERED_BYTES) // entry_bytes)
    for start in range(0, tokens.numel(), size):
        part = slice(start, min(start + size, tokens.numel()))
        columns = tokens[part].clamp(min=0)
        rows = torch.arange(part.start, part.stop, device=tokens.device) // call.tokens.shape[1]
        found = _products(call.hidden, call.weight, rows, columns)
        if call.low is not None and call.up is not None:
            found += _products(call.low, call.up, rows, columns)
        affine[part] = found if call.bias is None else found + call.bias[columns].float()
    logits, slope = affine * options.logit_scale, torch.ones_like(affine)
    if options.softcap:
        t = torch.tanh(logits / options.softcap)
        logits, slope = options.softcap * t, (1 - t) * (1 + t)
    absent = tokens < 0
    return tuple(t.masked_fill(absent, 0).view(call.tokens.shape) for t in (logits, slope))  # type: ignore[return-value]


def _products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Row left[rows] times row right[columns], (n,) float32."""
    return left[rows].float().mul_(right[columns].float()).sum(dim=1)


def sums_of_equals(tokens: Tensor, values: Tensor, scratch_bytes: int) -> Tensor:
    """For each token (N, K) the sum of ``values`` (N, K) over the row's tokens that are the same."""
    count = tokens.shape[1]
    size = max(1, (scratch_bytes or GATHERED_BYTES) // (8 * max(count, 1) ** 2))
    total = torch.empty_like(values)
    for start in range(0, tokens.shape[0], size):
        rows = slice(start, start + size)
        same = tokens[rows, :, None] == tokens[rows, None, :]
        total[rows] = torch.where(same, values[rows, None, :], 0.0).sum(dim=2)
    return total


@triton.jit
def _sftmix_tokens_kernel(
    dlogits,  # (N, V_s) a slice
    tokens,  # (N, K) int64 columns of the whole vocabulary, -1: none
    values,  # (N, K) float32; one value where a row names a token twice
    num_rows,
    num_tokens,
    first_column,
    num_columns,
    stride_on,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    for k in range(num_tokens):
        at = rows * num_tokens + k
        column = tl.load(tokens + at, mask=mask, other=-1) - first_column
        here = mask & (column >= 0) & (column < num_columns)
        value = tl.load(values + at, mask=here, other=0.0)
        tl.store(dlogits + rows * stride_on + column, value.to(dlogits.dtype.element_ty), mask=here)


def store_at_tokens(dlogits: Tensor, tokens: Tensor, values: Tensor, first_column: int) -> None:
    """dlogits (N, V_s) = ``values`` (N, K) at the ``tokens`` (N, K) that lie in this slice."""
    num_rows, num_tokens = tokens.shape
    block = 128
    _sftmix_tokens_kernel[(triton.cdiv(num_rows, block),)](
        dlogits=dlogits, tokens=tokens, values=values, num_rows=num_rows, num_tokens=num_tokens,
        first_column=first_column, num_columns=dlogits.shape[1], stride_on=dlogits.stride(0), BLOCK=block, num_warps=4,
    )  # fmt: skip
