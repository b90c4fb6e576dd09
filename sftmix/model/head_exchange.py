"""A head that is never gathered: every process keeps its rows of it and sees the hidden states of all processes.

Gathering an output layer costs each process the bytes of its V D weights, those of their float32 gradient, and the
memory of both. Exchanging costs those of all processes' rows of hidden states and of their float32 gradients instead,
which is less where all rows together are fewer than V (:func:`head_traffic`). To optimizer, clipping and checkpoints
the weight is a DTensor ``Shard(0)`` either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sftmix.model.targets import is_lora
from sftmix_kernels import LossHead, SFTMixLoss, TokenStats

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sftmix.model.causal_lm import SFTMixModel

HEAD_SHARDINGS = ("gather", "exchange", "auto")
STATISTICS_BYTES = (
    48  # of a row and its half of a mixture: four float64 each, from every shard to every process
)


class HeadTraffic(NamedTuple):
    """Bytes that one process receives for the head, forward and backward of one micro-batch."""

    gather: int
    exchange: int


def head_traffic(
    *, rows: int, vocab_size: int, hidden_size: int, processes: int, itemsize: int, trained: bool = True
) -> HeadTraffic:
    """Both ways' bytes for ``rows`` rows N of each of R processes; ``itemsize`` is that of the computing dtype.

    Of a head that is not ``trained`` no gradient is reduced.

        gather     (R - 1) / R V D (itemsize + 4)      the weight once, its float32 gradient once
        exchange   (R - 1) N (D (itemsize + 4) + 48 R)      hidden states and their float32 gradients, statistics

    Without statistics the exchange is less where R N < V. It does a fourth product of the head, which this leaves out.
    """
    others, element = processes - 1, itemsize + 4
    return HeadTraffic(
        others * vocab_size * hidden_size * (itemsize + 4 * trained) // processes,
        others * rows * (hidden_size * element + STATISTICS_BYTES * processes),
    )


def why_gathered(model: SFTMixModel) -> str | None:
    """Why the head of ``model`` cannot be exchanged; None where it can."""
    if model.is_tied:
        return "the head is tied to the input embedding, which is gathered"
    if is_lora(model):
        return "the head of a model with adapters is frozen, adapted or a copy beside the frozen one"
    if not model.head.weight.requires_grad:
        return "the head is frozen, so that it has no gradient to reduce"
    return None


def exchanges_head(
    model: SFTMixModel, head_sharding: str, *, processes: int, rows: int | None, replicas: int = 1
) -> bool:
    """Whether the head is exchanged. ``rows``: a process's rows in a micro-batch, which "auto" weighs.

    Raises ``ValueError`` for another name, for "exchange" of a head that must be gathered, and "auto" without rows.
    """
    if head_sharding not in HEAD_SHARDINGS:
        raise ValueError(f"head_sharding: expected one of {', '.join(HEAD_SHARDINGS)}, got {head_sharding!r}")
    if head_sharding == "gather":
        return False
    why = why_gathered(model)
    if replicas > 1:
        why = f"each of the {replicas} replicas has a head of its own, whose gradients only gathering sums"
    if head_sharding == "exchange":
        if why:
            raise ValueError(f"head_sharding: expected 'gather' or 'auto', got 'exchange': {why}")
        return True
    if type(rows) is not int or rows < 0:
        raise ValueError(f"rows: expected an int >= 0 with head_sharding='auto', got {rows!r}")
    if why or processes == 1:
        return False
    vocab_size, hidden_size = model.head.weight.shape
    traffic = head_traffic(
        rows=rows, vocab_size=vocab_size, hidden_size=hidden_size, processes=processes, itemsize=model.dtype.itemsize
    )  # fmt: skip
    return traffic.exchange < traffic.gather


class ExchangedHead(LossHead):
    """A ``LossHead`` whose parameters are DTensors ``Shard(0)`` that no FSDP unit manages (:func:`exchange_head`)."""

    mesh: DeviceMesh
    compute_dtype: torch.dtype

    def layer(self) -> tuple[Tensor, Tensor | None]:
        """This process's rows, rounded to the computing dtype anew in each forward."""
        bias = self.bias
        return self.weight.to(self.compute_dtype), None if bias is None else bias.to(self.compute_dtype)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,  # (..., D), (N, D) with a target
        target: Tensor | None = None,  # (N,) int64
        lam: Tensor | None = None,  # (M,) float32
        *,
        stats: bool = False,
        **options: Any,
    ) -> Tensor | SFTMixLoss | TokenStats:
        """As ``LossHead``'s, of own rows; a collective call. Logits, which no training asks for, gather the layer."""
        hidden = hidden.to(self.compute_dtype)
        if target is None and lam is None and not stats and not options:
            weight, bias = (None if t is None else _whole(t) for t in self.layer())
            return F.linear(hidden, weight, bias)  # type: ignore[arg-type]  # a weight there is
        return super().forward(hidden, target, lam, stats=stats, exchange=self.mesh, **options)


def exchange_head(head: LossHead, mesh: DeviceMesh, compute_dtype: torch.dtype) -> set[nn.Parameter]:
    """Keep this process's rows of ``head`` alone, in place; the parameters, which FSDP is to ignore."""
    for name, parameter in list(head.named_parameters(recurse=False)):
        whole = parameter.detach()
        # src_data_rank=None: every process takes its part of its own copy; a clone, or the whole would stay in memory.
        local = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None).to_local().clone()
        sharded = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        setattr(head, name, nn.Parameter(sharded))
    head.__class__ = ExchangedHead
    assert isinstance(head, ExchangedHead)
    head.mesh, head.compute_dtype = mesh, compute_dtype
    return set(head.parameters())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
