"""bfloat16 in Triton's interpreter, which keeps it as bit patterns, multiplies those and truncates what it casts.

Here operands are widened to float32 (exactly), and results are rounded to nearest even, as hardware does. bfloat16 is
the upper half of float32: the same exponent, 7 bits of 23.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers that bfloat16 bit patterns stand for, any shape."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: npt.NDArray[Any], *, to_zero: bool = False) -> npt.NDArray[np.uint16]:
    """The bit patterns of the nearest bfloat16 numbers, ties to even, or of those towards zero; NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = np.asarray(values).astype(np.float32)
    bits = narrow.view(np.uint32)
    found = bits if to_zero else bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (np.where(np.isnan(narrow), bits | 0x400000, found) >> 16).astype(np.uint16)


def mend_bfloat16() -> None:
    """Idempotent; Triton must be importable, and interpreting."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if builder.cast_impl.__module__ == __name__:
        return
    handle = interpreter.TensorHandle

    def is_bfloat16(operand: Any) -> bool:
        return (
            isinstance(operand, handle)
            and operand.data.dtype == np.uint16
            and operand.dtype.scalar == tl.bfloat16
        )

    def wide(operand: Any) -> Any:
        return handle(widened(operand.data), tl.float32) if is_bfloat16(operand) else operand

    def narrow(data: Any, **rounding: bool) -> Any:
        return handle(rounded(data, **rounding), tl.bfloat16)

    def in_float32(method: Any) -> Any:
        def through_float32(self: Any, *operands: Any) -> Any:
            if not is_bfloat16(operands[0]):
                return method(self, *operands)
            found = method(self, *map(wide, operands))
            # The last tensor has the result's type; a comparison's result is no number.
            last = [each for each in operands if isinstance(each, handle)][-1]
            is_number = np.asarray(found.data).dtype != np.bool_
            return narrow(found.data) if is_number and is_bfloat16(last) else found

        return through_float32

    for name in ("binary_op", "create_fma", "create_dot"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        return narrow(wide(source).data) if to.scalar == tl.bfloat16 else cast(self, wide(source), to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding_mode: Any) -> Any:
        if to.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64):
            return narrow(source.data, to_zero=rounding_mode == ir.ROUNDING_MODE.RTZ)
        return convert(self, source, to, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.get_bf16 = lambda self, value: narrow(np.array([value], dtype=np.float32))
