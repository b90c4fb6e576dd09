"""Every ``ValueError`` of the loss, in one form: ``target: expected int64 [N=128], got int32 [127]``.

Shapes, dtypes and devices are checked always. Values (targets in range, lam in [0, 1]) are checked by reading them
on eager CPU tensors; on a GPU or under ``torch.compile`` by ``torch._assert_async``, which never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """A short account of what the caller passed, for the end of a message."""
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def check_tensor(name: str, value: object, shape: dict[str, int], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``value`` is a tensor of the given dtypes whose dimensions are ``shape`` (name → size)."""
    # The text is made only when something is wrong: formatting a traced size would fix it at its present value.
    wrong = not isinstance(value, Tensor)
    if isinstance(value, Tensor):
        wrong = value.dtype not in dtypes or tuple(value.shape) != tuple(shape.values())
    if wrong:
        sizes = ", ".join(f"{name}={size}" for name, size in shape.items())
        kind = "" if isinstance(value, Tensor) else "a tensor "
        _fail(name, f"{kind}{' or '.join(map(_name, dtypes))} [{sizes}]", value)


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at values: of a CPU, and neither traced nor fake."""
    is_here = tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
    return is_here and not torch.compiler.is_compiling()


def _check_values(name: str, ok: Tensor, expected: str, got: Callable[[], str]) -> None:
    """``ok``: a bool tensor, true where the value is allowed. The message is built only when something is wrong."""
    holds = ok.all()
    if readable(ok):
        if not holds:
            _fail(name, expected, got())
    else:
        torch._assert_async(holds, f"{name}: expected {expected}")


MADE_IN_KERNELS = (
    "target, lam, row_weight, pair_weight, mixup_weight, ntp_denominator or mixup_denominator: expected class indices "
    "in [0, V) or ignore_index, lam in [0, 1], finite weights, and numbers >= 0 with no 0 below a sum of something"
)


def left_to_kernels(impl: str, device: torch.device, *, plain: bool) -> bool:
    """Whether values are checked in the kernel that reads them (fused/rows.py). ``plain``: no class weights, tokens,
    shards."""
    return plain and impl == "fused" and device.type != "cpu"


def check_head(hidden: object, weight: object, bias: object) -> None:
    """hidden [N, D], weight [V, D] and bias [V]: floating, of one dtype, on one device, V and D at least 1."""
    for name, value in (("hidden", hidden), ("weight", weight)):
        if not isinstance(value, Tensor) or value.ndim != 2:
            _fail(name, "a floating tensor [N, D]" if name == "hidden" else "a floating tensor [V, D]", value)
        if type(value).__name__ == "DTensor":
            _fail(name, "a local tensor; under FSDP2 compute the loss inside LossHead.forward", "a DTensor")
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if hidden.dtype not in FLOAT_DTYPES:
        _fail("hidden", "float32, float16, bfloat16 or float64 [N, D]", hidden)
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        _fail("weight", "[V, D] with V and D at least 1", weight)
    check_tensor("weight", weight, {"V": weight.shape[0], "D": hidden.shape[1]}, (hidden.dtype,))
    if bias is not None:
        check_tensor("bias", bias, {"V": weight.shape[0]}, (hidden.dtype,))
    check_devices(hidden.device, weight=weight, bias=bias)


def check_devices(device: torch.device, **tensors: object) -> None:
    """Every tensor among ``tensors`` must be on ``device``, the one of ``hidden``."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.device != device:
            _fail(name, f"a tensor on {device} like hidden", f"one on {value.device}")


def check_target(
    target: object, num_rows: int, vocab_size: int, ignore_index: int, *, values: bool = True
) -> None:
    """target [N] int64, each in [0, V) or equal to ``ignore_index``; ``values``: look at them here."""
    if type(ignore_index) is not int:
        _fail("ignore_index", "an int", ignore_index)
    check_tensor("target", target, {"N": num_rows}, (torch.int64,))
    assert isinstance(target, Tensor)
    if not values:
        return
    ok = ((target >= 0) & (target < vocab_size)) | (target == ignore_index)
    expected = f"class indices in [0, V={vocab_size}) or ignore_index={ignore_index}"
    _check_values(
        "target", ok, expected, lambda: f"{target[~ok][0].item()} at row {(~ok).nonzero()[0].item()}"
    )


ROUNDED = (
    "; 16 bits round it: pass float32 (under FSDP with a 16-bit policy set cast_forward_inputs=False, or pass Python "
    "numbers and integer counts)"
)
COUNT_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SIDE_DTYPES = (torch.float32, torch.float64, *COUNT_DTYPES)


def check_lam(lam: object, num_rows: int, *, values: bool = True) -> None:
    """lam [M] float32 or float64 with values in [0, 1] and 2M at most N."""
    if not isinstance(lam, Tensor) or lam.ndim != 1 or lam.dtype not in (torch.float32, torch.float64):
        is_half = isinstance(lam, Tensor) and lam.dtype in (torch.float16, torch.bfloat16)
        _fail("lam", "float32 or float64 [M]" + (ROUNDED if is_half else ""), lam)
    assert isinstance(lam, Tensor)
    if 2 * lam.shape[0] > num_rows:
        _fail("lam", f"[M] with 2M at most N={num_rows}, M confident rows and M partners", lam)
    if values:
        ok = (lam >= 0) & (lam <= 1)
        _check_values(
            "lam", ok, "values in [0, 1]", lambda: f"{lam[~ok][0].item()} at pair {(~ok).nonzero()[0].item()}"
        )
    check_no_grad(lam=lam)


def check_no_grad(**values: object) -> None:
    """None of the named tensors may require a gradient: the loss gives them none."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            _fail(name, "a tensor that requires no gradient (the loss gives it none)", value)


def check_side_dtype(name: str, value: Tensor, expected: str) -> None:
    """A tensor beside the rows: float32, float64, bool or integers, never 16-bit floats."""
    if value.dtype in (torch.float16, torch.bfloat16):
        _fail(name, expected + ROUNDED, value)
    if value.dtype not in SIDE_DTYPES:
        _fail(name, expected, value)


def check_weights(name: str, value: object, shape: dict[str, int], *, values: bool = True) -> None:
    """row_weight [N] or pair_weight [M]: None or a tensor of numbers, finite."""
    if value is None:
        return
    if isinstance(value, Tensor):
        ((size_name, _),) = shape.items()
        check_side_dtype(name, value, f"float32, float64, bool or integers [{size_name}]")
    check_tensor(name, value, shape, SIDE_DTYPES)
    assert isinstance(value, Tensor)
    if values and value.is_floating_point():
        ok = value.detach().isfinite()
        _check_values(name, ok, "finite values", lambda: f"{value[~ok][0].item()}")
    check_no_grad(**{name: value})


def check_class_weight(value: object, vocab_size: int | Tensor) -> None:
    """class_weight: None or float32 or float64 [V], finite and at least 0; V of the whole vocabulary."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.ndim != 1:
        _fail("class_weight", "a float32 or float64 tensor [V]", value)
    assert isinstance(value, Tensor)
    check_side_dtype("class_weight", value, "float32 or float64 [V]")
    size = value.shape[0] if isinstance(vocab_size, Tensor) else vocab_size
    check_tensor("class_weight", value, {"V": size}, (torch.float32, torch.float64))
    if isinstance(vocab_size, Tensor):
        expected = "[V], V that of all shards"
        _check_values("class_weight", vocab_size == size, expected, lambda: f"{size} with V={vocab_size}")
    ok = (value.detach() >= 0) & value.detach().isfinite()
    _check_values("class_weight", ok, "finite values >= 0", lambda: f"{value[~ok][0].item()}")
    check_no_grad(class_weight=value)


def check_tokens(value: object, num_rows: int, vocab_size: int | Tensor, ignore_index: int) -> Tensor | None:
    """tokens: None or int64 [N, K], each in [0, V) or ``ignore_index``; as columns, -1 where there is none."""
    if value is None:
        return None
    count = value.shape[1] if isinstance(value, Tensor) and value.ndim == 2 else 1
    check_tensor("tokens", value, {"N": num_rows, "K": count}, (torch.int64,))
    assert isinstance(value, Tensor)
    ok = ((value >= 0) & (value < vocab_size)) | (value == ignore_index)
    expected = f"class indices in [0, V) or ignore_index={ignore_index}"
    _check_values("tokens", ok, expected, lambda: f"{value[~ok][0].item()}")
    return torch.where(value == ignore_index, -1, value)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _fail(name, "True or False", value)


def check_transforms(impl: str, *tensors: Tensor | None) -> None:
    """No forward-mode or functional derivative of an implementation that has neither: it would be a silent 0."""
    if torch.compiler.is_compiling():
        return
    found = "torch.func or vmap" if torch._C._functorch.peek_interpreter_stack() is not None else None
    if forward_ad._current_level >= 0:
        dual = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        found = found or ("forward-mode derivatives" if dual else None)
    if found:
        raise ValueError(
            f"impl: expected impl='reference' under {found}, got impl={impl!r}, which has a backward alone"
        )


def check_shift(shift: object, target: Tensor) -> int:
    """shift: False, True or an int from 0 to T, the size of target's last dimension; as an int."""
    size = target.shape[-1] if target.ndim else 0
    if not isinstance(shift, int) or not 0 <= shift <= size:
        _fail("shift", f"an int from 0 to T={size}", shift)
    assert isinstance(shift, int)
    return int(shift)


def check_main_grad(main_grad: object, weight: Tensor, dtype: torch.dtype) -> None:
    """main_grad [V, D] of the dtype of sums, its own memory, for a weight that is trained."""
    if main_grad is None:
        return
    if type(main_grad).__name__ == "DTensor":
        _fail("main_grad", "a local tensor; FSDP2 owns its gradients", "a DTensor")
    check_tensor("main_grad", main_grad, {"V": weight.shape[0], "D": weight.shape[1]}, (dtype,))
    assert isinstance(main_grad, Tensor)
    if any(
        stride == 0 and size > 1 for stride, size in zip(main_grad.stride(), main_grad.shape, strict=True)
    ):
        _fail("main_grad", "memory of its own for every element", f"strides {list(main_grad.stride())}")
    check_devices(weight.device, main_grad=main_grad)
    check_no_grad(main_grad=main_grad)
    if not weight.requires_grad:
        _fail("main_grad", "None beside a weight that requires no gradient", main_grad)


def plain_number(value: object) -> object:
    """A numpy scalar, or a 0-d tensor on a CPU, as the Python number that it is; anything else as it came."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 and not value.requires_grad and readable(value) else value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def number(name: str, value: object, *, positive: bool = True, most: float = float("inf")) -> float:
    """softcap, logit_scale, label_smoothing, z_loss: a finite number > 0, or at least 0, and at most ``most``."""
    value = plain_number(value)
    bound = "a finite number > 0" if positive else "a finite number >= 0"
    expected = bound if most == float("inf") else f"a number in [0, {most:g}]"
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        _fail(name, expected, value)
    assert isinstance(value, (int, float))
    if not (0 < value if positive else 0 <= value) or not value <= most or value == float("inf"):
        _fail(name, expected, value)
    return value


Scalar = tuple[
    Tensor | None, float
]  # one of the two: 0-d on the rows' device, or a number; (None, NaN): not given


def scalar(name: str, value: object, device: torch.device, *, values: bool = True) -> Scalar:
    """mixup_weight or a denominator: None, a finite number at least 0, or a 0-d tensor of one, moved to ``device``.

    A tensor of a CPU beside rows of a GPU would be frozen into a CUDA graph at its present value: refused there.
    """
    if value is None:
        return None, float("nan")
    if not isinstance(value, Tensor):
        value = plain_number(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat)) or (
            torch.compiler.is_compiling() and isinstance(value, (int, float)) and not isinstance(value, bool)
        ):
            return None, value  # type: ignore[return-value]  # a traced number, not looked at
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _fail(name, "a number >= 0 or a 0-d tensor", value)
        return None, number(name, value, positive=False)
    if value.ndim != 0 or value.dtype.is_complex or value.dtype == torch.bool:
        _fail(name, "a number >= 0 or a 0-d tensor", value)
    if value.dtype in (torch.float16, torch.bfloat16):
        _fail(name, "a number, or a 0-d tensor of float32, float64 or integers" + ROUNDED, value)
    check_no_grad(**{name: value})
    tensor = value.detach()
    if values or tensor.device != device:
        ok = tensor >= 0
        _check_values(
            name, ok & tensor.isfinite() if tensor.is_floating_point() else ok, "a finite value >= 0",
            lambda: f"{tensor.item()}",
        )  # fmt: skip
    if tensor.device != device:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _fail(name, f"a number or a 0-d tensor on {device} while a CUDA graph is captured", value)
        tensor = tensor.to(device, non_blocking=True)
    return tensor, float("nan")


def check_denominators(ntp: Scalar, mixup: Scalar, target: Tensor, num_pairs: int, ignore_index: int) -> None:
    """A denominator of 0 may stand under a sum of nothing: 0 / 0 is 0 here."""
    for name, (tensor, given) in (("ntp_denominator", ntp), ("mixup_denominator", mixup)):
        if tensor is None and given != 0:
            continue
        valid = target != ignore_index
        if name == "mixup_denominator":
            valid = valid[:num_pairs] & valid[num_pairs : 2 * num_pairs]
        ok = ~valid.any() if tensor is None else (tensor != 0) | ~valid.any()
        _check_values(name, ok, "a value > 0 where there is something to divide", lambda: "0")
