"""The loss with the vocabulary's rows of ``weight`` and ``bias`` spread over the ranks of a process group.

Every rank holds the same rows (hidden, target, lam) and its own V_r columns of logits, any number of them:

    first_r = sum of V_q over ranks q < r,   V = sum of V_q
    lse = logsumexp_r lse_r,   target_logit = sum_r target_logit_r,   max = max_r max_r,   mean = sum_r V_r mean_r / V
    dhidden = sum_r G_r W_r,   dweight_r = G_r^T hidden,   dbias_r = sum of G_r over rows

and the same lse and target logits for the mixtures. A target becomes a column of its own shard or -1 in every other,
so it can match nothing there. Collectives: one of the shards' sizes and one of all statistics in the forward, one sum
of dhidden in the backward. The statistics are gathered and folded in the order of the ranks, so every rank gets the
same bits. G needs the lse of all shards, so the backward recomputes its logits: a fourth product per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from .chunked import Needs, chunked_loss
from .ops import refuse_double_backward, total_loss, wanted
from .reference import sum_dtype
from .rows import Given, Head, head_of, row_term
from .vocab_shard import gather

Tensors = tuple[Tensor, ...]


class _Stats(NamedTuple):
    """What a shard, or all of them, know of N rows and M mixtures; ``low`` is what rounding took from lse."""

    lse: Tensor  # (N,)
    low: Tensor  # (N,)
    max_logit: Tensor  # (N,)
    target_logit: Tensor  # (N,) 0 where the column is elsewhere
    mean_logit: Tensor  # (N,)
    lse_x: Tensor  # (M,)
    low_x: Tensor  # (M,)
    target_logit_xc: Tensor  # (M,)
    target_logit_xu: Tensor  # (M,)


def _own_columns(target: Tensor, place: Tensor, num_columns: int) -> Tensor:
    """Targets as columns of this shard; -1 at ignored rows and where the column is another shard's."""
    column = target - place[0]
    return torch.where((target >= 0) & (column >= 0) & (column < num_columns), column, -1)


def _shard_stats(
    hidden: Tensor, head: Head, column: Tensor, lam: Tensor, *, fused: bool, scratch_bytes: int
) -> _Stats:
    """Statistics of this shard's columns alone."""
    dtype, num_rows, num_pairs = sum_dtype(hidden.dtype), hidden.shape[0], lam.shape[0]
    rows, pairs = hidden.new_zeros(num_rows, dtype=dtype), hidden.new_zeros(num_pairs, dtype=dtype)
    if head.weight.shape[0] == 0:  # no column: log of an empty sum
        none, none_x = torch.full_like(rows, -torch.inf), torch.full_like(pairs, -torch.inf)
        return _Stats(none, rows, none, rows, rows, none_x, pairs, pairs, pairs)
    if fused:
        from .fused import fused_forward

        options: dict[str, Any] = {"want_mean_logit": True} if head.label_smoothing else {}
        s = fused_forward(
            hidden, head.weight, column, lam, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale,
            **options,
        )  # fmt: skip
        mean_logit = s.mean_logit if head.label_smoothing else rows
        low, low_x = s.row_carry[1], s.pair_carry[1]
        found = (s.lse, low, s.max_logit, s.target_logit, mean_logit, s.lse_x, low_x)
        return _Stats(*found, s.target_logit_xc, s.target_logit_xu)
    c = chunked_loss(
        hidden, head, column, lam, row_coef=rows, pair_coef=pairs, needs=Needs(), scratch_bytes=scratch_bytes
    )
    mean_logit = c.mean_logit if head.label_smoothing else rows
    found = (c.lse, c.low, c.max_logit, c.target_logit, mean_logit, c.lse_x, c.low_x)
    return _Stats(*found, c.target_logit_xc, c.target_logit_xu)


def _log_sum(lse: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the ranks' summed exponentials [R, n]: float64, then as rounded to lse's dtype and the rest."""
    exact = torch.logsumexp(lse.double() + low.double(), dim=0)
    rounded = exact.to(lse.dtype)
    return exact, rounded, (exact - rounded).to(lse.dtype)


def _nll(lse: Tensor, target_logit: Tensor, valid: Tensor) -> Tensor:
    """-log p [n] in the statistics' dtype from float64 lse, 0 where there is no target."""
    nll = (lse - target_logit).to(target_logit.dtype)
    return torch.where(valid, nll, torch.zeros_like(nll))


@torch.library.custom_op("sftmix_kernels::vocab_parallel_fwd", mutates_args=())
def vocab_parallel_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    target: Tensor,  # (N,) of the whole vocabulary, -1 at ignored rows
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    place: Tensor,  # (2,)
    options: list[float],
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
    fused: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse, is_top1, mixup_nll, then row_carry [3, N] and pair_carry [4, M] for the backward."""
    head = head_of(weight, bias, options)
    column = _own_columns(target, place, weight.shape[0])
    local = _shard_stats(hidden, head, column, lam, fused=fused, scratch_bytes=scratch_bytes)
    local = local._replace(mean_logit=local.mean_logit * weight.shape[0])
    packed = gather(torch.cat(local), _resolve_process_group(group_name))  # type: ignore[arg-type]
    of = _Stats(*packed.split([t.shape[0] for t in local], dim=1))

    num_pairs = lam.shape[0]
    valid = target >= 0
    lse, rounded, low = _log_sum(of.lse, of.low)
    target_logit = of.target_logit.sum(dim=0)
    nll = _nll(lse, target_logit, valid)
    is_top1 = valid & (target_logit >= of.max_logit.amax(dim=0))
    lse_x, rounded_x, low_x = _log_sum(of.lse_x, of.low_x)
    valid_c, valid_u = valid[:num_pairs], valid[num_pairs : 2 * num_pairs]
    nll_xc = _nll(lse_x, of.target_logit_xc.sum(dim=0), valid_c)
    nll_xu = _nll(lse_x, of.target_logit_xu.sum(dim=0), valid_u)
    share = lam.to(nll.dtype)
    mixup_nll = share * nll_xc + (1 - share) * nll_xu
    mixup_nll = torch.where(valid_c & valid_u, mixup_nll, torch.zeros_like(mixup_nll))

    mean_logit = of.mean_logit.sum(dim=0) / place[1]
    term = row_term(head, nll, rounded, mean_logit)
    loss = total_loss(term, mixup_nll, row_coef, pair_coef)
    row_carry, pair_carry = torch.stack([rounded, low, nll]), torch.stack([rounded_x, low_x, nll_xc, nll_xu])
    return loss, nll, rounded, is_top1, mixup_nll, row_carry, pair_carry


@vocab_parallel_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=sum_dtype(hidden.dtype))

    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    is_top1 = hidden.new_empty(num_rows, dtype=torch.bool)
    stats = (new(), new(num_rows), new(num_rows), is_top1, new(num_pairs))
    return (*stats, new(3, num_rows), new(4, num_pairs))


@torch.library.custom_op("sftmix_kernels::vocab_parallel_bwd", mutates_args=())
def vocab_parallel_bwd(
    grad_loss: Tensor,  # ()
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    place: Tensor,  # (2,)
    row_carry: Tensor,  # (3, N)
    pair_carry: Tensor,  # (4, M)
    options: list[float],
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
    fused: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden summed over the ranks, this shard's dweight and dbias; empty where not needed."""
    dtype, fake = sum_dtype(hidden.dtype), fake_gradients(grad_loss, hidden, weight, needs=needs)
    if weight.shape[0]:
        column = _own_columns(target, place, weight.shape[0])
        head = head_of(weight, bias, options, place[1].to(dtype))
        coefs = (row_coef * grad_loss, pair_coef * grad_loss)
        carries = (row_carry, pair_carry)
        gradients = (_fused_gradients if fused else _chunked_gradients)(
            hidden,
            head,
            column,
            lam,
            coefs=coefs,
            carries=carries,
            needs=Needs(*needs),
            scratch_bytes=scratch_bytes,
        )
    else:
        gradients = tuple(torch.zeros_like(t) for t in fake)
    total = gradients[0].to(dtype)
    if needs[0]:
        dist.all_reduce(total, group=_resolve_process_group(group_name))  # type: ignore[arg-type]
    return total.to(hidden.dtype), gradients[1], gradients[2]


def _chunked_gradients(
    hidden: Tensor, head: Head, column: Tensor, lam: Tensor, *, coefs: tuple[Tensor, Tensor],
    carries: tuple[Tensor, Tensor], needs: Needs, scratch_bytes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dhidden in the sums' dtype, dweight and dbias in weight's."""
    result = chunked_loss(
        hidden, head, column, lam, row_coef=coefs[0], pair_coef=coefs[1], needs=needs, scratch_bytes=scratch_bytes,
        given=Given(carries[0][0], carries[0][1], carries[1][0], carries[1][1]),
    )  # fmt: skip
    dhidden = result.dhidden.to(result.scale.dtype) * result.scale
    weights = (g.mul_(result.scale).to(head.weight.dtype) for g in (result.dweight, result.dbias))
    return dhidden, *weights


def _fused_gradients(
    hidden: Tensor, head: Head, column: Tensor, lam: Tensor, *, coefs: tuple[Tensor, Tensor],
    carries: tuple[Tensor, Tensor], needs: Needs, scratch_bytes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same by the kernels; dhidden is rounded to hidden's dtype once per shard."""
    from .fused import fused_backward

    extra: dict[str, Any] = {"label_smoothing": head.label_smoothing, "z_loss": head.z_loss}
    if head.label_smoothing:
        extra["total_vocab"] = head.total_vocab
    return fused_backward(
        hidden, head.weight, column, lam, coefs[0].float(), coefs[1].float(), *carries, bias=head.bias,
        softcap=head.softcap, logit_scale=head.logit_scale, need_dhidden=needs.dhidden, need_dweight=needs.dweight,
        need_dbias=needs.dbias, scratch_bytes=scratch_bytes or None,
        **(extra if head.label_smoothing or head.z_loss else {}),
    )  # fmt: skip


def fake_gradients(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any, needs: list[bool]
) -> Tensors:
    dhidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
    dweight = weight.new_empty(weight.shape if needs[1] else (0,))
    return dhidden, dweight, weight.new_empty((weight.shape[0],) if needs[2] else (0,))


@vocab_parallel_bwd.register_fake
def _(grad_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensors:
    return fake_gradients(grad_loss, hidden, weight, needs=rest[-4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.save_for_backward(*inputs[:8], *output[5:])
    ctx.extra = inputs[8:]


def _autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = vocab_parallel_bwd(grad_loss, *ctx.saved_tensors, *ctx.extra)
    return (*wanted(gradients, ctx.extra[1]), *(None,) * 10)


vocab_parallel_fwd.register_autograd(_autograd, setup_context=_setup)
vocab_parallel_bwd.register_autograd(refuse_double_backward)
