"""Exponentials as the kernels take them, and the logits' nonlinearity built on them.

Of a tile's instructions beside its products most belong to its exponentials, so each is one multiplication and one
instruction of the special function unit, which bounds what is left (bench/SASS.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .configs import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter has no libdevice.
_COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def _exp2(x):
    """2^x, 0 under 2^-126: results under it would cost tl.exp2 three instructions for each that counts."""
    if _COMPILED:
        return libdevice.exp2(x)
    else:
        return tl.exp2(x)


@triton.jit
def _ratio(x, y):
    """x / y to 2 digits of the last place, 0 where y is past 2^126, whose scaling `/` looks after."""
    if _COMPILED:
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@triton.jit
def exp(x):
    """e^x to 2^-22 relative, and x 2^-24 for the change of base; 0 under 2^-126."""
    return _exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """tanh to 2e-7 relative."""
    u = tl.minimum(x * x, 1.0)
    p = -0.05374844 + u * (0.020664724 - u * 0.0057311947)
    near = x + x * u * (-0.33333287 + u * (0.13331561 + u * p))
    return tl.where(u < 0.39, near, 1.0 - 2.0 / (exp(2.0 * x) + 1.0))


@triton.jit
def _rounded_product(x, y):
    """fl(x y). Compilers make `x * y - m` one operation, so that a logit less itself, the maximum, is not 0."""
    return tl.fma(x, y, 0.0)


@triton.jit
def capped(z, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, EXACT: tl.constexpr):
    """f(z) of affine logits z, and f' over the scale: 1 without a cap, 1 - (f / cap)^2 with one.

    Unless EXACT, tanh is right to 2e-7 absolute, in a third of the work: 1 - 2 / (e^2x + 1) cancels near 0.
    """
    if SOFTCAP == 0.0:
        if LOGIT_SCALE != 1.0:
            z = _rounded_product(z, LOGIT_SCALE)
        return z, 1.0
    else:
        if EXACT:
            t = tanh(z * LOGIT_SCALE * (1.0 / SOFTCAP))
        else:
            t = 1.0 - _ratio(2.0, _exp2(z * (2.0 * LOG2E * LOGIT_SCALE / SOFTCAP)) + 1.0)
        return _rounded_product(t, SOFTCAP), 1.0 - t * t
