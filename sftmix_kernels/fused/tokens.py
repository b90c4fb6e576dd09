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
from .tiles import CHANGING

GATHERED_BYTES = 32 * 2**20  # of gathered rows at a time, where a call names no bound


def affine_at(call: Call, tokens: Tensor) -> Tensor:
    """Affine logits (N, K), float32, of each row's columns ``tokens`` (N, K); of column 0 where that is -1.

    Memory: ``scratch_bytes`` or GATHERED_BYTES of gathered rows, at least one of each, and O(N K).
    """
    columns = tokens.flatten().clamp(min=0)
    affine = torch.empty(columns.shape, dtype=torch.float32, device=columns.device)
    width = call.hidden.shape[1] + (0 if call.low is None else call.low.shape[1])
    entry_bytes = width * (2 * call.hidden.element_size() + 8)
    size = max(1, (call.wanted.scratch_bytes or GATHERED_BYTES) // entry_bytes)
    for start in range(0, columns.numel(), size):
        some = columns[start : start + size]
        rows = torch.arange(start, start + some.numel(), device=some.device) // tokens.shape[1]
        found = _products(call.hidden, call.weight, rows, some)
        if call.low is not None and call.up is not None:
            found += _products(call.low, call.up, rows, some)
        affine[start : start + size] = found if call.bias is None else found + call.bias[some].float()
    return affine.view(tokens.shape)


def finished(call: Call, affine: Tensor) -> tuple[Tensor, Tensor | float]:
    """f of affine logits, and f' over the scale."""
    cap, logits = call.options.softcap, affine * call.options.logit_scale
    if not cap:
        return logits, 1.0
    t = torch.tanh(logits / cap)
    return cap * t, (1 - t) * (1 + t)


def token_logits(call: Call) -> Tensor:
    """Final logits (N, K) of ``call.tokens``, float32; 0 where a token is -1. Memory as of :func:`affine_at`."""
    assert call.tokens is not None
    return finished(call, affine_at(call, call.tokens))[0].masked_fill(call.tokens < 0, 0)


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


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=("tokens",))
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
