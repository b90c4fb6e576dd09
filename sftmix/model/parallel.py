"""FSDP2: one process per device, parameters sharded, the same numbers as one process.

A unit is a set of modules gathered together: every decoder block is one, final norm and head are one, the
rest (the embedding) is the root's. A head tied to the embedding stays in the root's unit with it, or the
parameter would be gathered twice; one that is exchanged is in none (head_exchange.py). No unit casts its
inputs: under a bfloat16 policy FSDP would round lambda.
Gradients are summed over processes, not averaged, because the loss is already divided by global counts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from sftmix.model.causal_lm import cast_parameters
from sftmix.model.head_exchange import exchange_head, exchanges_head
from sftmix.model.rendezvous import PATIENCE, join
from sftmix.model.targets import decoder_blocks, is_lora

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel


@dataclass(frozen=True)
class World:
    """This process among all: ``mesh`` is None when it is alone."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None


def local_device() -> torch.device:
    """The device of this process: its own GPU (``LOCAL_RANK``) where there is one, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def join_world(device: torch.device) -> World:
    """Join the process group that torchrun describes (``RANK``, ``WORLD_SIZE``); alone without it.

    Uses gloo on a CPU and nccl on GPUs. Joining twice is joining once.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized():
        if size == 1:
            return World()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join("nccl" if device.type == "cuda" else "gloo")
    if dist.get_world_size() == 1:
        return World()
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    return World(rank=dist.get_rank(), size=dist.get_world_size(), mesh=mesh)


def leave_world() -> None:
    """Leave the process group, at the end of a program that joined it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def shard(
    model: SFTMixModel,
    world: World,
    *,
    head_sharding: str = "gather",
    rows: int | None = None,
    replicas: int = 1,
) -> SFTMixModel:
    """Shard the model in place over ``world``; alone it is left as it is.

    ``head_sharding``: "gather" the head like any other unit, "exchange" hidden states in its place, or "auto", what
    moves fewer bytes with ``rows`` rows of a process in a micro-batch (head_exchange.py). ``replicas``: the processes
    are divided into so many groups, each of which holds the whole model (HSDP); one per node where nodes are far apart.

    A model trained in full is kept in float32 shards and computed in its own dtype, with gradients reduced in
    float32; modules whose parameters the model keeps in float32 are units of their own, computed in float32. Under
    LoRA the frozen base and the float32 adapters are gathered as they are, and modules that are trained whole beside
    them as in a model trained in full. One unit at a time is cast and moved to the processes' device, so that a model
    that was read on the CPU never stands whole on a GPU.

    Raises ``ValueError`` for a module that holds both kinds itself: a unit has one dtype. And for "exchange" of a head
    that is tied, frozen, of a model with adapters, or has replicas, and ``replicas`` that do not divide the processes.
    """
    is_exchanged = exchanges_head(model, head_sharding, processes=world.size, rows=rows, replicas=replicas)
    mesh = _mesh_of(world, replicas)
    if mesh is None:
        return model
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        reshard(model)
        return model
    units = _Units(mesh, model)
    if not is_lora(model):
        for module in kept_in_float32(model) if model.dtype != torch.float32 else []:
            units.own(module)
    ignored: set[nn.Parameter] = set()
    if is_exchanged:
        cast_parameters(model.head, torch.float32)
        ignored = exchange_head(model.head, mesh, model.dtype)
    shared = {id(model.head), id(model.base.get_input_embeddings())} if model.is_tied else set()
    for module in _trained_whole(model) if is_lora(model) else []:
        # Its float32 shards are cast where they are gathered, the adapters beside it are not: a unit of its own.
        kinds = {p.dtype for p in module.parameters(recurse=False)}
        cast_parameters(module, torch.float32)
        if id(module) not in shared:
            (units.own if kinds == {torch.float32} else units.cast)(module)
    for block in decoder_blocks(model)[1]:
        units.add(block)
    if not model.is_tied:
        # The head's backward comes straight after its forward: gathering it once is enough.
        units.add(*_after_blocks(model), *([] if is_exchanged else [model.head]), reshard_after_forward=False)
    root = units.cast if model.is_tied and model.head.weight.requires_grad else units.add
    root(model, ignored_params=ignored)
    register_fsdp_forward_method(model, "generate")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that also scales
    return model


def reshard(model: nn.Module) -> None:
    """Let go of what is still gathered: the root and the head stay whole after a forward without backward.

    Until then ``named_parameters`` names the gathered copies, which FSDP frees; an optimizer, or a reader of weights,
    must not take those.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh_of(world: World, replicas: int) -> DeviceMesh | None:
    if world.size % replicas:
        raise ValueError(f"train.replicas: expected a divisor of the {world.size} processes, got {replicas}")
    if world.mesh is None or replicas == 1:
        return world.mesh
    ranks = torch.arange(world.size).view(replicas, -1)  # [replicas, shards]
    # Groups of our own: those that a mesh makes wait for ten or thirty minutes, whatever the whole group waits.
    groups = [
        dist.new_subgroups_by_enumeration(part.tolist(), timeout=PATIENCE)[0] for part in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(
        groups, world.mesh.device_type, mesh=ranks, mesh_dim_names=("replicate", "shard")
    )


class _Units:
    """``fully_shard`` of a model's modules, as it is to be trained."""

    def __init__(self, mesh: DeviceMesh, model: SFTMixModel) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.mesh = mesh
        self.masters = (
            not is_lora(model) and model.dtype != torch.float32
        )  # float32 shards, gathered in 16 bits
        self.as_is = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
        self.in_dtype = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)

    def add(self, *modules: nn.Module, **options: Any) -> None:
        """One unit of modules that are in none yet."""
        from torch.distributed.fsdp import FSDPModule

        found = [module for module in modules if not isinstance(module, FSDPModule)]
        if self.masters:
            for module in found:
                cast_parameters(module, torch.float32)
        if found:
            self._shard(found, self.in_dtype if self.masters else self.as_is, **options)

    def own(self, module: nn.Module, **options: Any) -> None:
        """A unit that is gathered in the data type it has."""
        self._shard([module], self.as_is, **options)

    def cast(self, module: nn.Module, **options: Any) -> None:
        """A unit of float32 shards that is gathered in the model's data type."""
        if self.masters:
            cast_parameters(module, torch.float32)
        self._shard([module], self.in_dtype, **options)

    def _shard(self, modules: list[nn.Module], policy: Any, **options: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        chosen = modules[0] if len(modules) == 1 else modules
        fully_shard(chosen, mesh=self.mesh, mp_policy=policy, **options)  # type: ignore[arg-type]


def kept_in_float32(model: SFTMixModel) -> list[nn.Module]:
    """The outermost modules of a 16-bit model whose parameters are all float32, such as routers.

    Raises ``ValueError`` for a module that itself holds parameters of both data types.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        own = {p.dtype for p in module.parameters(recurse=False)}
        if len(own) > 1:
            names = [n for n, p in module.named_parameters(recurse=False) if p.dtype == torch.float32]
            raise ValueError(
                f"model.dtype: expected float32 with several processes, as {type(model.base).__name__} keeps "
                f"{', '.join(names)} of {name} in float32 beside 16-bit parameters, got {model.dtype}"
            )
        kinds = {p.dtype for p in module.parameters()}
        if kinds == {torch.float32} and id(module) not in inside:
            found.append(module)
            inside |= {id(child) for child in module.modules()}
    return found


def _trained_whole(model: SFTMixModel) -> list[nn.Module]:
    """Modules that hold a parameter trained without an adapter, the innermost first."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if ".lora_" not in name and any(weight.requires_grad for weight in module.parameters(recurse=False))
    ]
    return [module for name, module in sorted(found, key=lambda pair: -pair[0].count("."))]


def _after_blocks(model: SFTMixModel) -> list[nn.Module]:
    """The decoder's children with parameters that stand after its blocks: the final norm."""
    name = decoder_blocks(model)[0]
    parent = model.base.get_submodule(name.rpartition(".")[0])
    children = dict(parent.named_children())
    names = list(children)
    after = names[names.index(name.rpartition(".")[2]) + 1 :]
    return [children[key] for key in after if next(children[key].parameters(), None) is not None]


def whole(tensor: Tensor) -> Tensor:
    """The unsharded value of a parameter or gradient; a collective call when it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(value: Tensor, *, like: Tensor) -> Tensor:
    """A whole tensor, equal on every process, sharded as ``like`` is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    # src_data_rank=None: every process takes its part of its own copy, nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def sum_over_world(values: Tensor, world: World) -> Tensor:
    """Sum of a tensor over the processes, in place."""
    if world.mesh is not None:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any, world: World) -> list[Any]:
    """One value of every process, on every process."""
    if world.mesh is None:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
