"""The output layer as the portable engine multiplies with it: in the inputs' dtype, or widened a slice at a time.

Where a device has no 16-bit products (hardware.py) they are made in float32: hidden states are widened a chunk of rows
at a time and the weight a slice of the vocabulary at a time, so nothing of size [V, D] is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..hardware import product_support
from ..reference import sum_dtype
from .rows import Head
from .scratch import blocks

WIDENED_BYTES = 8 * 2**20  # of a widened slice of the weight: stays in a CPU's caches
WIDENED_COLUMNS = (128, 4096)  # least and most


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices of ``dtype`` are multiplied: that of sums where the device has no such products."""
    return dtype if product_support(dtype, device).in_hardware else sum_dtype(dtype)


class Layer:
    """A :class:`Head` whose weight, bias and ``up`` are had in slices of the vocabulary, in the dtype of products."""

    def __init__(self, head: Head) -> None:
        vocab_size, width = head.weight.shape
        least, most = WIDENED_COLUMNS
        self.head, self.dtype = head, product_dtype(head.weight.dtype, head.weight.device)
        self.is_widened = self.dtype != head.weight.dtype
        columns = min(most, max(least, WIDENED_BYTES // (self.dtype.itemsize * width)))
        self.most_columns = min(vocab_size, columns) if self.is_widened else vocab_size
        size = (self.most_columns, width) if self.is_widened else (0,)
        self._weight = head.weight.new_empty(size, dtype=self.dtype)

    def widen(self, rows: Tensor) -> Tensor:
        """Hidden states or low-rank features in the dtype of products; themselves where that is theirs."""
        return rows.to(self.dtype)

    def of(self, columns: slice) -> Head:
        """The head of these columns, at most ``most_columns``; a widened weight is overwritten by the next call."""
        head = self.head
        weight = head.weight[columns]
        if self.is_widened:
            weight = self._weight[: weight.shape[0]].copy_(weight)
        bias, up = (None if t is None else t[columns].to(self.dtype) for t in (head.bias, head.up))
        return head._replace(weight=weight, bias=bias, up=up)

    def slices(self) -> Iterator[tuple[slice, Head]]:
        """All columns, in as few slices as there can be."""
        for columns in blocks(0, self.head.weight.shape[0], self.most_columns):
            yield columns, self.of(columns)
