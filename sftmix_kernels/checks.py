"""Every ``ValueError`` of the loss, in one form: ``target: expected int64 [N=128], got int32 [127]``.

Shapes, dtypes and devices are checked always. Values (targets in range, lam in [0, 1]) are checked by reading them
on eager CPU tensors; on a GPU or under ``torch.compile`` by ``torch._assert_async``, which never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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


def _check_values(name: str, ok: Tensor, expected: str, got: Callable[[], str]) -> None:
    """``ok``: a bool tensor, true where the value is allowed. The message is built only when something is wrong."""
    holds = ok.all()
    if ok.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(ok, FakeTensor):
        if not holds:
            _fail(name, expected, got())
    else:
        torch._assert_async(holds, f"{name}: expected {expected}")


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


def check_target(target: object, num_rows: int, vocab_size: int, ignore_index: int) -> None:
    """target [N] int64, each in [0, V) or equal to ``ignore_index``."""
    if type(ignore_index) is not int:
        _fail("ignore_index", "an int", ignore_index)
    check_tensor("target", target, {"N": num_rows}, (torch.int64,))
    assert isinstance(target, Tensor)
    ok = ((target >= 0) & (target < vocab_size)) | (target == ignore_index)
    expected = f"class indices in [0, V={vocab_size}) or ignore_index={ignore_index}"
    _check_values(
        "target", ok, expected, lambda: f"{target[~ok][0].item()} at row {(~ok).nonzero()[0].item()}"
    )


def check_lam(lam: object, num_rows: int) -> None:
    """lam [M] float32 with values in [0, 1] and 2M at most N."""
    if not isinstance(lam, Tensor) or lam.ndim != 1 or lam.dtype != torch.float32:
        _fail("lam", "float32 [M]", lam)
    assert isinstance(lam, Tensor)
    if 2 * lam.shape[0] > num_rows:
        _fail("lam", f"[M] with 2M at most N={num_rows}, M confident rows and M partners", lam)
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


def check_weights(name: str, value: object, shape: dict[str, int]) -> None:
    """row_weight [N] or pair_weight [M]: None or a floating tensor, finite."""
    if value is None:
        return
    check_tensor(name, value, shape, FLOAT_DTYPES)
    assert isinstance(value, Tensor)
    ok = value.detach().isfinite()
    _check_values(name, ok, "finite values", lambda: f"{value[~ok][0].item()}")
    check_no_grad(**{name: value})


def check_main_grad(main_grad: object, weight: Tensor, dtype: torch.dtype, **absent: object) -> None:
    """main_grad [V, D] of the dtype of sums, its own memory, for a weight that is trained; nothing of ``absent``."""
    if main_grad is None:
        return
    for name, value in absent.items():
        if value is not None:
            _fail("main_grad", f"None beside {name}", main_grad)
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


def check_share(name: str, value: object) -> None:
    """label_smoothing: a Python number in [0, 1)."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        _fail(name, "a number in [0, 1)", value)


def check_scalar(name: str, value: object, *, positive: bool, tensors: bool = True) -> None:
    """A finite number or (``tensors``) a 0-d tensor; it must be > 0 (``positive``) or ≥ 0."""
    bound = "> 0" if positive else ">= 0"
    if isinstance(value, Tensor) and not tensors:
        _fail(name, f"a finite number {bound}", value)
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.dtype == torch.bool or value.dtype.is_complex:
            _fail(name, f"a number {bound} or a 0-d tensor", value)
        check_no_grad(**{name: value})
        ok = value.detach() > 0 if positive else value.detach() >= 0
        _check_values(name, ok & value.isfinite(), f"a finite value {bound}", lambda: f"{value.item()}")
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        _fail(name, f"a number {bound} or a 0-d tensor", value)
    elif not (value > 0 if positive else value >= 0) or value == float("inf"):
        _fail(name, f"a finite number {bound}", value)


def check_number(name: str, value: object) -> None:
    """softcap, logit_scale: a finite Python number > 0."""
    if (
        isinstance(value, (bool, Tensor))
        or not isinstance(value, (int, float))
        or not 0 < value < float("inf")
    ):
        _fail(name, "a finite number > 0", value)
