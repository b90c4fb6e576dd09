"""One rank's rows of the output layer: what may be passed, and where in the vocabulary it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from .. import checks
from ..call import NAMESPACE
from ..reference import sum_dtype


class Shard(NamedTuple):
    """This rank's part of the output layer."""

    weight: Tensor  # (V_r, D), local
    bias: Tensor | None  # (V_r,), local
    group_name: str
    place: Tensor  # (2,) int64 on weight's device: the first column of this shard, V


def resolve_shard(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ranks: object, *, name: str = "vocab_parallel"
) -> Shard:
    """The local shard and its place, from local tensors or from DTensors ``Shard(0)`` on the same ranks.

    ``ranks``, the argument ``name``, is a ProcessGroup or a 1-D DeviceMesh. A DTensor's gradient is a DTensor placed
    like it.
    A collective call: the shards' sizes are exchanged, without making the host wait for a GPU.
    Raises ValueError naming the argument for another kind of group, another placement or mesh, a wrong shape or dtype.
    """
    group = group_of(ranks, name)
    weight = _local("weight", weight, group, name)
    bias = None if bias is None else _local("bias", bias, group, name)
    _check_shard(hidden, weight, bias)
    return Shard(weight, bias, group.group_name, shard_place(weight.detach(), group.group_name))


def group_of(ranks: Any, name: str) -> ProcessGroup:
    """The process group that the argument ``name`` is, or is a mesh of."""
    if isinstance(ranks, ProcessGroup):
        return ranks
    if type(ranks).__name__ != "DeviceMesh" or ranks.ndim != 1:
        raise ValueError(
            f"{name}: expected a torch.distributed ProcessGroup this rank is in or a 1-D DeviceMesh, got "
            f"{type(ranks).__name__} {ranks!r}"
        )
    group: ProcessGroup = ranks.get_group()
    return group


def group_named(name: str) -> ProcessGroup:
    """The process group that an operator was given by name."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # GroupName in torch's types, a str at run time


def _local(name: str, value: Any, group: ProcessGroup, ranks: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name}: expected a local shard or a DTensor Shard(0), got {checks.describe(value)}"
        )
    if type(value).__name__ != "DTensor":
        return value
    dtensor: Any = value  # imported by name only: a plain import would load torch.distributed.tensor
    mesh, placements = dtensor.device_mesh, dtensor.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name}: expected a DTensor Shard(0) on a 1-D mesh, got {placements} on a {mesh.ndim}-D mesh"
        )
    if mesh.get_group().group_name != group.group_name and (
        dist.get_process_group_ranks(mesh.get_group()) != dist.get_process_group_ranks(group)
    ):
        raise ValueError(f"{name}: expected a DTensor on the ranks of {ranks}, got one on {mesh}")
    local: Tensor = dtensor.to_local()
    return local


def _check_shard(hidden: object, weight: Tensor, bias: Tensor | None) -> None:
    """As ``checks.check_head``, but a shard may be empty."""
    if not isinstance(hidden, Tensor) or hidden.ndim != 2 or type(hidden).__name__ == "DTensor":
        raise ValueError(f"hidden: expected a local floating tensor [N, D], got {checks.describe(hidden)}")
    if hidden.dtype not in checks.FLOAT_DTYPES or hidden.shape[1] < 1:
        raise ValueError(
            f"hidden: expected float32, float16, bfloat16 or float64 [N, D], got {checks.describe(hidden)}"
        )
    num_columns = weight.shape[0] if weight.ndim == 2 else -1
    checks.check_tensor("weight", weight, {"V_r": num_columns, "D": hidden.shape[1]}, (hidden.dtype,))
    if bias is not None:
        checks.check_tensor("bias", bias, {"V_r": num_columns}, (hidden.dtype,))
    checks.check_devices(hidden.device, weight=weight, bias=bias)


def check_target(target: object, num_rows: int, ignore_index: int, shard: Shard) -> None:
    """target [N] int64, each in [0, V) of the whole vocabulary or equal to ``ignore_index``."""
    checks.check_tensor("target", target, {"N": num_rows}, (torch.int64,))
    assert isinstance(target, Tensor)
    checks.check_devices(shard.weight.device, target=target)
    ok = ((target >= 0) & (target < shard.place[1])) | (target == ignore_index)
    expected = f"class indices in [0, V), V that of all shards, or ignore_index={ignore_index}"
    checks._check_values("target", ok, expected, lambda: f"{target[~ok][0].item()} with V={shard.place[1]}")


def gather(local: Tensor, group: ProcessGroup) -> Tensor:
    """The group's tensors [...] of one shape as [R, ...], by rank."""
    gathered = local.new_empty(dist.get_world_size(group), *local.shape)
    dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=group)
    return gathered


def sum_over_shards(gradient: Tensor, dtype: torch.dtype, group_name: str) -> Tensor:
    """The ranks' gradients of rows, summed in the dtype of sums and rounded to ``dtype``; (0,) is not needed."""
    total = gradient.to(sum_dtype(dtype))
    if total.numel():
        dist.all_reduce(total, group=group_named(group_name))
    return total.to(dtype)


class _JoinColumns(torch.autograd.Function):
    """Every rank's columns side by side; the backward hands each its own, for all ranks go on alike."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        size = torch.tensor([local.shape[1]], device=local.device)
        sizes = [int(n) for n in gather(size, group)[:, 0]]
        rank = dist.get_rank(group)
        ctx.own = sum(sizes[:rank]), local.shape[1]
        padded = gather(F.pad(local, (0, max(sizes) - local.shape[1])), group)
        return torch.cat([part[:, :n] for part, n in zip(padded, sizes, strict=True)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(1, *ctx.own).contiguous(), None


class _SumGradient(torch.autograd.Function):
    """Rows as they are; their gradient is the sum over the ranks, each of which saw its own columns of logits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.to(sum_dtype(grad.dtype), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


def reference_shard(
    hidden: Tensor, low: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """For the reference: hidden and low, whose gradients are summed over the ranks, and its ``join``.

    Collectives: sizes and logits of every projection in the forward, one sum for each of both in the backward;
    the host waits for the sizes. First derivatives only.
    """
    group = group_named(group_name)
    summed: list[Any] = [None if t is None else _SumGradient.apply(t, group) for t in (hidden, low)]
    return summed[0], summed[1], lambda logits: _JoinColumns.apply(logits, group)


@torch.library.custom_op(f"{NAMESPACE}::shard_place", mutates_args=())
def shard_place(weight: Tensor, group_name: str) -> Tensor:
    """[first column of this shard, V], int64 on weight's device."""
    group = group_named(group_name)
    size = torch.full((1,), weight.shape[0], dtype=torch.int64, device=weight.device)
    sizes = gather(size, group)[:, 0]
    return torch.stack([sizes[: dist.get_rank(group)].sum(), sizes.sum()])


@shard_place.register_fake
def _(weight: Tensor, group_name: str) -> Tensor:
    return weight.new_empty(2, dtype=torch.int64)
