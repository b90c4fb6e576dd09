"""The library products of both schedules: 16-bit operands, float32 sums; and their scaling and rounding at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import on_device

_BLOCK = 4096


def multiplies_into_float32(tensor: Tensor) -> bool:
    """Whether the library can multiply 16-bit matrices into a float32 result (``out_dtype=``).

    torch 2.11 and later can on NVIDIA GPUs of capability 8.0 and above; elsewhere operands are upcast first.
    """
    if tensor.device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
    """total (float32) += left @ right * scale, accumulated in float32 whatever the operands' dtype."""
    if scale is not None:
        product = torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
        write_product(product, left, right, scale)
        total += product
    elif left.dtype == torch.float32:
        total.addmm_(left, right)
    elif multiplies_into_float32(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def write_product(out: Tensor, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
    """out = left @ right * scale, accumulated in float32 and rounded once, to operands' dtype or not at all."""
    if scale is None and out.dtype != left.dtype and multiplies_into_float32(left):
        torch.mm(left, right, out_dtype=torch.float32, out=out)
        return
    if scale is None and (left.dtype == torch.float32 or multiplies_into_float32(left)):
        torch.mm(left, right, out=out)
        return
    if left.dtype == torch.float32:
        product = torch.mm(left, right)
    elif multiplies_into_float32(left):
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        product = torch.mm(left.float(), right.float())
    out.copy_(product if scale is None else product.mul_(scale))


@triton.jit
def _sftmix_round_kernel(gradient, factor, out, size, BLOCK: tl.constexpr):
    """out = gradient * factor, multiplied in factor's dtype."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(gradient + offs, mask=offs < size).to(factor.dtype.element_ty) * tl.load(factor)
    tl.store(out + offs, product.to(out.dtype.element_ty), mask=offs < size)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times factor (0-d), multiplied in factor's dtype and rounded once to ``dtype``, in one pass.

    torch's own product of two dtypes takes twice as long as the memory does.
    """
    gradient = gradient.contiguous()
    out = torch.empty_like(gradient, dtype=dtype)
    if size := gradient.numel():
        with on_device(gradient.device):
            _sftmix_round_kernel[(triton.cdiv(size, _BLOCK),)](
                gradient=gradient, factor=factor, out=out, size=size, BLOCK=_BLOCK, num_warps=8
            )
    return out
