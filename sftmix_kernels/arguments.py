"""From the arguments of the public functions to one checked :class:`Call`, and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .call import Call, Needs, Options
from .choice import REFUSED, Choice, HeadFacts, choose, choose_impl
from .lora_head import LoRA, low_rank
from .reference import sum_dtype
from .vocab_parallel import (
    Ranks,
    Shard,
    agree,
    check_target,
    group_of,
    reference_layer,
    reference_shard,
    refuse,
    resolve_shard,
)


class HeadOptions(NamedTuple):
    """Numbers that belong to the head and the next-token terms; the reference's keywords."""

    softcap: Any = None
    logit_scale: Any = 1.0
    label_smoothing: Any = 0.0
    z_loss: Any = 0.0

    def checked(self) -> HeadOptions:
        """As Python numbers."""
        return HeadOptions(
            None if self.softcap is None else checks.number("softcap", self.softcap),
            checks.number("logit_scale", self.logit_scale),
            checks.number("label_smoothing", self.label_smoothing, positive=False, most=1.0),
            checks.number("z_loss", self.z_loss, positive=False),
        )


class Rows(NamedTuple):
    """What stands beside the rows."""

    lam: Any = None  # (M,)
    row_weight: Any = None  # (N,)
    pair_weight: Any = None  # (M,)
    class_weight: Any = None  # (V,)
    mixup_weight: Any = 0.0
    ntp_denominator: Any = None
    mixup_denominator: Any = None
    tokens: Any = None  # (N, K)
    ignore_index: Any = -100
    token_scaling: Any = False


class Ways(NamedTuple):
    """What else a call is to give, and how it is to run."""

    lora: LoRA | None = None
    vocab_parallel: Any = None
    main_grad: Any = None
    impl: str | None = None
    schedule: str | None = None
    scratch_bytes: int | None = None
    rows: bool = False  # each row's term may have an upstream of its own
    detached: bool = False
    entropy: bool = False
    predicted: bool = False
    exchange: Any = None


def make_call(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: HeadOptions, rows: Rows,
    ways: Ways, *, shard: Shard | None = None,
) -> tuple[Call, Choice]:  # fmt: skip
    """Check everything, once; with ``vocab_parallel`` or ``exchange`` a collective call.

    Raises ValueError naming the argument; with ``exchange`` on every rank where one of them does.
    """
    if shard is None:
        if ways.exchange is not None:
            return _exchanged_call(hidden, weight, target, bias, options, rows, ways)
        if ways.vocab_parallel is None:
            checks.check_head(hidden, weight, bias)
        else:
            shard = resolve_shard(hidden, weight, bias, ways.vocab_parallel)
    if shard is not None:
        weight, bias = shard.weight, shard.bias
    device, dtype = hidden.device, hidden.dtype
    impl = choose_impl(ways.impl, device, dtype)
    plain = shard is None and rows.class_weight is None and rows.tokens is None
    values = not checks.left_to_kernels(impl, device, plain=plain)
    if shard is None:
        checks.check_target(target, hidden.shape[0], weight.shape[0], rows.ignore_index, values=values)
        checks.check_devices(device, target=target)
    else:
        check_target(target, hidden.shape[0], rows.ignore_index, shard)
    numbers = options.checked()
    low, up = (
        (None, None)
        if ways.lora is None
        else low_rank(hidden, weight, target != rows.ignore_index, ways.lora)
    )
    if ways.detached:
        hidden, weight = hidden.detach(), weight.detach()
        bias, low, up = (None if t is None else t.detach() for t in (bias, low, up))
    grad = torch.is_grad_enabled()
    tensors = (hidden, weight, bias, low, up)
    needs = Needs(*(grad and t is not None and t.requires_grad for t in tensors))
    choice = choose(
        impl, HeadFacts(device, dtype, hidden.shape[0], *weight.shape), needs, schedule=ways.schedule,
        scratch_bytes=ways.scratch_bytes, rows=ways.rows, vocab_parallel=ways.vocab_parallel is not None,
        exchange=ways.exchange is not None, main_grad=ways.main_grad is not None,
    )  # fmt: skip
    if choice.impl != "reference":
        checks.check_transforms(choice.impl, *tensors)
    vocab_size = weight.shape[0] if shard is None else shard.place[1]
    side, scalars = _side_inputs(device, sum_dtype(dtype), target, rows, vocab_size, values)
    checks.check_main_grad(ways.main_grad, weight, sum_dtype(dtype))
    wanted = (int(ways.entropy), int(ways.predicted), rows.ignore_index, choice.scratch_bytes)
    plan = [*(int(needed) for needed in needs), *wanted]
    call = Call(
        hidden, weight, bias, low, up, ways.main_grad, target, **side, place=None if shard is None else shard.place,
        numbers=list(Options(*(float(number or 0.0) for number in numbers), *scalars)), plan=plan,
        engine=choice.impl, group_name="" if shard is None else shard.group_name,
    )  # fmt: skip
    return call, choice


def _exchanged_call(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: HeadOptions, rows: Rows,
    ways: Ways,
) -> tuple[Call, Choice]:  # fmt: skip
    """This rank's call, once every rank has one."""
    if ways.vocab_parallel is not None:
        why = REFUSED["exchange", "vocab_parallel"]
        raise ValueError(f"exchange: expected None beside vocab_parallel, got both: {why}")
    if torch.compiler.is_compiling():
        raise ValueError(
            "exchange: expected no torch.compile(fullgraph=True), as the host waits for the ranks' sizes"
        )
    name, shard = group_of(ways.exchange, "exchange").group_name, None
    try:
        shard = resolve_shard(hidden, weight, bias, ways.exchange, name="exchange")
        call, choice = make_call(hidden, weight, target, bias, options, rows, ways, shard=shard)
    except ValueError:
        device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
        refuse(name, device, weight, has_place=shard is not None)
        raise
    return call, choice._replace(ranks=agree(call, name, hidden.device))


def _side_inputs(
    device: torch.device,
    dtype: torch.dtype,
    target: Tensor,
    rows: Rows,
    vocab_size: int | Tensor,
    values: bool,
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """The tensors beside the rows by name, ``lam`` in ``dtype``; token scaling, mixup weight and denominators as
    numbers, or NONE."""
    num_rows = target.shape[0]
    names = ("mixup_weight", "ntp_denominator", "mixup_denominator")
    found = [checks.scalar(name, getattr(rows, name), device, values=values) for name in names]
    without_pairs = found[0][0] is None and found[0][1] == 0
    if rows.lam is None:
        lam = torch.empty(0, dtype=dtype, device=device)
    else:
        lam = rows.lam
        checks.check_lam(lam, num_rows, values=values or without_pairs)
    num_pairs = lam.shape[0]
    checks.check_weights("row_weight", rows.row_weight, {"N": num_rows}, values=values)
    checks.check_weights("pair_weight", rows.pair_weight, {"M": num_pairs}, values=values or without_pairs)
    checks.check_class_weight(rows.class_weight, vocab_size)
    checks.check_flag("token_scaling", rows.token_scaling)
    tokens = checks.check_tokens(rows.tokens, num_rows, vocab_size, rows.ignore_index)
    checks.check_devices(
        device, lam=lam, row_weight=rows.row_weight, pair_weight=rows.pair_weight, class_weight=rows.class_weight,
        tokens=tokens,
    )  # fmt: skip
    if values:
        checks.check_denominators(found[1], found[2], target, num_pairs, rows.ignore_index)
    pair_weight = rows.pair_weight
    if num_pairs and without_pairs:
        lam, pair_weight = lam[:0], None
    tensors = {
        "lam": lam.to(dtype),
        "row_weight": rows.row_weight,
        "pair_weight": pair_weight,
        "class_weight": rows.class_weight,
        **{name: tensor for name, (tensor, _) in zip(names, found, strict=True)},
        "tokens": tokens,
    }
    return tensors, (float(rows.token_scaling), *(number for _, number in found))


class _AddTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grads[0])
        return None, None


def for_reference(call: Call, ranks: Ranks | None) -> dict[str, Any]:
    """The reference's keywords for rows, layer and its numbers; main_grad gets weight's gradient."""
    hidden, weight, bias, low, up = call[:5]
    if call.main_grad is not None:
        weight = _AddTo.apply(weight, call.main_grad)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    join: Callable[[Tensor], Tensor] | None = None
    if ranks is not None:
        weight, bias, up = reference_layer(weight, bias, up, ranks)
    elif call.place is not None:
        hidden, low, join = reference_shard(hidden, low, call.group_name)
    return {
        "hidden": hidden, "weight": weight, "target": call.target, "bias": bias, "low": low, "up": up,
        "join": join, "softcap": call.options.softcap or None, "logit_scale": call.options.logit_scale,
        "ignore_index": call.wanted.ignore_index,
    }  # fmt: skip


def for_reference_loss(call: Call, ranks: Ranks | None) -> dict[str, Any]:
    """The same, and what stands beside the rows' terms."""
    options = call.options
    numbers = {"label_smoothing": options.label_smoothing, "z_loss": options.z_loss}
    beside = {"class_weight": call.class_weight, "token_scaling": bool(options.token_scaling)}
    return for_reference(call, ranks) | numbers | beside


def number_or_tensor(call: Call, name: str) -> float | Tensor | None:
    """A coefficient of the call as the reference takes it; None where it is a count."""
    tensor, number = getattr(call, name), getattr(call.options, name)
    return tensor if tensor is not None else None if number != number else number
