"""What the operators ask of the kernels: statistics of a call, and gradients from what was kept of them."""

from __future__ import annotations

from ..call import Call, Gradients, Kept, Statistics, Upstream
from .forward import fused_forward
from .recompute import fused_backward
from torch import Tensor


def statistics(call: Call, column: Tensor) -> Statistics:
    """Statistics of every row and mixture, with no logits in memory; targets as in :class:`Statistics`."""
    options, wanted = call.options, call.wanted
    found = fused_forward(
        call.hidden, call.weight, column, call.lam, bias=call.bias, softcap=options.softcap,
        logit_scale=options.logit_scale, low=call.low, up=call.up, want_entropy=bool(wanted.entropy),
        want_mean_logit=options.label_smoothing != 0,
    )  # fmt: skip
    none = call.hidden.new_empty(0, dtype=column.dtype)
    return Statistics(
        found.max_logit, found.target_logit, found.mean_logit, found.entropy, none, found.lse.new_empty(0, 0),
        found.pair_carry[2:], found.row_carry, found.pair_carry,
    )  # fmt: skip


def gradients(call: Call, column: Tensor, kept: Kept, upstream: Upstream) -> Gradients:
    """Gradients from logits made again, a slice of the vocabulary at a time (recompute.py)."""
    options, needs = call.options, call.needs
    found = fused_backward(
        call.hidden, call.weight, column, call.lam, upstream.row.float(), upstream.pair.float(), kept.row_carry,
        kept.pair_carry, bias=call.bias, softcap=options.softcap, logit_scale=options.logit_scale,
        label_smoothing=options.label_smoothing, z_loss=options.z_loss,
        total_vocab=None if call.place is None else call.place[1].to(call.dtype), low=call.low, up=call.up,
        main_grad=call.main_grad, scratch_bytes=call.wanted.scratch_bytes or None,
        **{f"need_{name}": needed for name, needed in needs._asdict().items()},
    )  # fmt: skip
    dhidden, dweight, dbias, *low_rank = found
    dlow, dup = low_rank or (dhidden.new_empty(0), dweight.new_empty(0))
    return Gradients(dhidden, dweight, dbias, dlow, dup)
