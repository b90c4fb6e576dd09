"""What a chunk's dlogits give: the gradients of rows, and its share of those of the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, Gradients, empty_gradients
from .layer import Layer
from .scratch import PRODUCT_COLUMNS, blocks
from .statistics import Group


class Products:
    """dhidden = G W, dlow = G up; dweight, dbias and dup are sums over chunks: G^T hidden, of G's rows, G^T low."""

    def __init__(self, call: Call, layer: Layer, scale: Tensor) -> None:
        self.call, self.layer, self.dtype = call, layer, call.dtype
        self.gradients = empty_gradients(call, call.dtype)
        self.gradients.dup.zero_()
        self.dweight = self.gradients.dweight if call.main_grad is None else call.main_grad
        self.is_written = call.main_grad is not None
        # What a dweight product is multiplied by on its way to main_grad.
        self.scale = scale if call.main_grad is not None and call.hidden.dtype != call.dtype else None
        # float64, so that it does not matter how many chunks there are: V numbers cost nothing.
        self.dbias = torch.zeros_like(self.gradients.dbias, dtype=torch.float64)

    def result(self) -> Gradients:
        if not self.is_written:
            self.dweight.zero_()
        return self.gradients._replace(dbias=self.dbias.to(self.dtype))

    def add(self, group: Group, chunk: slice, hidden: Tensor, low: Tensor | None, gradient: Tensor) -> None:
        """dlogits [n, V] of a chunk's rows, hidden [n, D] and low [n, r], with 0 in rows that bear no loss."""
        needs = self.call.needs
        if needs.dbias:
            self.dbias += gradient.sum(dim=0, dtype=self.dtype)
        if needs.dhidden or needs.dlow:
            self._of_rows(group, chunk, gradient)
        if needs.dweight:
            self._add_to_dweight(hidden, gradient)
        if needs.dup and low is not None:
            self.gradients.dup.add_(torch.mm(gradient.t(), low))

    def _of_rows(self, group: Group, chunk: slice, gradient: Tensor) -> None:
        """dhidden = G W and dlow = G up, summed over slices of a widened weight before they are rounded."""
        dhidden: Tensor | None = None
        dlow: Tensor | None = None
        needs = self.call.needs
        for columns, head in self.layer.slices():
            part = gradient[:, columns]
            if needs.dhidden:
                dhidden = (
                    torch.mm(part, head.weight) if dhidden is None else dhidden.addmm_(part, head.weight)
                )
            if needs.dlow and head.up is not None:
                dlow = torch.mm(part, head.up) if dlow is None else dlow.addmm_(part, head.up)
        for into, found in ((self.gradients.dhidden, dhidden), (self.gradients.dlow, dlow)):
            if found is not None:
                into_rows = group.of(into, chunk)
                into_rows.copy_(found.view(into_rows.shape))

    def _add_to_dweight(self, hidden: Tensor, gradient: Tensor) -> None:
        """dweight += G^T hidden; the first chunk writes it. 16-bit products are rounded, then summed in float32."""
        written, self.is_written = self.is_written, True
        if hidden.dtype == self.dtype:
            if self.scale is not None:
                hidden = hidden * self.scale
            torch.addmm(self.dweight, gradient.t(), hidden, beta=1 if written else 0, out=self.dweight)
            return
        # In slices of the vocabulary, so that no second [V, D] is made.
        for columns in blocks(0, gradient.shape[1], PRODUCT_COLUMNS):
            product = torch.mm(gradient[:, columns].t(), hidden)
            if not written:
                self.dweight[columns] = product
            elif self.scale is None:
                self.dweight[columns] += product
            else:
                self.dweight[columns] += product.to(self.dtype).mul_(self.scale)
