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
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sftmix.model.causal_lm import cast_parameters
from sftmix.model.head_exchange import exchange_head, exchanges_head
from sftmix.model.rendezvous import join
from sftmix.model.targets import decoder_blocks, is_lora

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sftmix.model.causal_lm import SFTMixModel


# How long a process waits for the others: the main one tokenises, exports and writes answers.
PATIENCE = timedelta(hours=2)


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
        join("nccl" if device.type == "cuda" else "gloo", PATIENCE)
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
    model: SFTMixModel, world: World, *, head_sharding: str = "gather", rows: int | None = None
) -> SFTMixModel:
    """Shard the model in place over ``world``; alone it is left as it is.

    ``head_sharding``: "gather" the head like any other unit, "exchange" hidden states in its place, or "auto", what
    moves fewer bytes with ``rows`` rows of a process in a micro-batch (head_exchange.py).

    A model trained in full is kept in float32 shards and computed in its own dtype, with gradients reduced in
    float32; modules whose parameters the model keeps in float32 are units of their own, computed in float32. Under
    LoRA the frozen base and the float32 adapters are gathered as they are, and modules that are trained whole beside
    them as in a model trained in full.

    Raises ``ValueError`` for a module that holds both kinds itself: a unit has one dtype. And for "exchange" of a head
    that is tied, frozen, or of a model with adapters.
    """
    is_exchanged = exchanges_head(model, head_sharding, processes=world.size, rows=rows)
    if world.mesh is None:
        return model
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if isinstance(model, FSDPModule):
        return model
    own = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    unit: dict[str, Any] = {"mesh": world.mesh, "mp_policy": own}
    cast = {**unit, "mp_policy": MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)}
    if not is_lora(model) and model.dtype != torch.float32:
        kept = kept_in_float32(model)
        cast_parameters(model, torch.float32)
        for module in kept:
            fully_shard(module, **unit)
        unit = cast
    ignored = exchange_head(model.head, world.mesh, model.dtype) if is_exchanged else set()
    shared = {id(model.head), id(model.base.get_input_embeddings())} if model.is_tied else set()
    for module in _trained_whole(model) if is_lora(model) else []:
        # Its float32 shards are cast where they are gathered, the adapters beside it are not: a unit of its own.
        kinds = {p.dtype for p in module.parameters(recurse=False)}
        cast_parameters(module, torch.float32)
        if id(module) not in shared:
            fully_shard(module, **(unit if kinds == {torch.float32} else cast))
    for block in decoder_blocks(model)[1]:
        if not isinstance(block, FSDPModule):
            fully_shard(block, **unit)
    if not model.is_tied:
        # The head's backward comes straight after its forward: gathering it once is enough.
        end = _after_blocks(model) if is_exchanged else [*_after_blocks(model), model.head]
        last = [module for module in end if not isinstance(module, FSDPModule)]
        if last:
            fully_shard(last, reshard_after_forward=False, **unit)
    own_unit = cast if model.is_tied and model.head.weight.requires_grad else unit
    fully_shard(model, ignored_params=ignored, **own_unit)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that also scales
    return model


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
