"""A head that is never gathered: the ranks exchange hidden states in place of the output layer's weight.

Rank r holds its own rows (N_r, D), its own loss L_r and its own rows (V_r, D) of the layer. Its shard sees the rows of
all ranks, so with L = sum_r g_r L_r, g_r the upstream of each rank's loss,

    forward    hidden of all ranks gathered; the shards' statistics folded (vocab_parallel/statistics.py); own rows kept
    backward   the upstream of every row gathered; dweight_r = dL / dweight_r is whole on its owner;
               dhidden = sum of the shards' parts, in float32, scattered to the rows' owners

A rank sends and receives about (R - 1) N D elements twice where a gathered head takes V D twice, and no tensor of V D
elements is ever made. The logits are made again in the backward: a fourth product per row.

vocab_parallel/rows.py: the order of the rows, and their collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators, terms
from .call import TENSORS, Call, Coefficients, Kept
from .terms import Terms
from .vocab_parallel import Ranks, join_call, join_upstream, own_statistics, own_sum

FIRST_FIVE = 5  # loss, term, lse, entropy, token_logprob: the terms that carry gradients


def run(call: Call, ranks: Ranks) -> Terms:
    """This rank's terms of its call; a collective call, and so is its backward."""
    return Terms(*_Exchanged.apply(ranks, *call))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class _Exchanged(torch.autograd.Function):
    """Terms of this rank's rows; forward and backward are collective calls."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *arguments: Any) -> tuple[Tensor, ...]:
        call = Call(*arguments)
        coef = terms.coefficients(call)
        joined = join_call(call, coef.column, ranks)
        column = torch.where(joined.target != call.wanted.ignore_index, joined.target, -1)
        everyone = operators.statistics(joined, column)
        own = own_statistics(everyone, ranks)
        found = terms.finish(call, coef, own)
        ctx.set_materialize_grads(False)
        ctx.ranks, ctx.rest, ctx.main_grad = ranks, call[TENSORS:], call.main_grad
        kept = (everyone.row_carry, everyone.pair_carry, everyone.entropy)
        ctx.save_for_backward(
            *joined._replace(main_grad=None)[:TENSORS], call.tokens, *coef, own.nll, column, *kept
        )
        ctx.mark_non_differentiable(*found[FIRST_FIVE:])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what is returned would be a constant to a second backward
            raise RuntimeError(
                "sftmix_loss: double backward (create_graph=True) is not supported with exchange"
            )
        # A rank whose loss has no upstream takes part: the others' rows pass through its shard.
        ranks, saved = ctx.ranks, ctx.saved_tensors
        joined = Call(*saved[:TENSORS], *ctx.rest)._replace(main_grad=ctx.main_grad)
        tokens, *coef, nll, column, row_carry, pair_carry, entropy = saved[TENSORS:]
        own = joined._replace(tokens=tokens)
        upstream = terms.upstream_of(own, Coefficients(*coef), nll, grads[:FIRST_FIVE])
        found = operators.of_shard(
            joined, column, Kept(row_carry, pair_carry, entropy), join_upstream(upstream, own, ranks)
        )
        needs, dtype = joined.needs, joined.hidden.dtype
        if needs.dhidden:
            found = found._replace(dhidden=own_sum(found.dhidden, dtype, ranks))
        if needs.dlow:
            found = found._replace(dlow=own_sum(found.dlow, dtype, ranks))
        return (None, *operators.of_inputs(found, joined))
