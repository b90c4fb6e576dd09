"""The vocabulary's rows of ``weight`` and ``bias`` spread over the ranks of a process group.

Every rank holds the same rows (hidden, target, lam) and its own V_r columns of logits, any number of them:

    first_r = sum of V_q over ranks q < r,   V = sum of V_q
    dhidden = sum_r G_r W_r,   dweight_r = G_r^T hidden,   dbias_r = sum of G_r over rows
    dlow = sum_r G_r up_r,     dup_r = G_r^T low                                  with low-rank factors

A target becomes a column of its own shard or -1 in every other, so it can match nothing there. Collectives: one of the
shards' sizes and one of all statistics in the forward, the sums of dhidden and dlow in the backward. G needs the lse
of all shards, so the backward recomputes its logits: a fourth product per row.

With ``exchange`` every rank holds other rows, which are joined first (rows.py; ../exchange.py is the call).

shard.py: one rank's part, and the reference's · statistics.py: those of all shards · rows.py: those of all ranks
"""

from .rows import Ranks, agree, join_call, join_upstream, own_statistics, own_sum, reference_layer, refuse
from .shard import Shard, check_target, group_of, reference_shard, resolve_shard, sum_over_shards
from .statistics import of_no_columns, own_columns, whole

__all__ = [
    "Ranks",
    "Shard",
    "agree",
    "check_target",
    "group_of",
    "join_call",
    "join_upstream",
    "of_no_columns",
    "own_columns",
    "own_statistics",
    "own_sum",
    "reference_layer",
    "reference_shard",
    "refuse",
    "resolve_shard",
    "sum_over_shards",
    "whole",
]
