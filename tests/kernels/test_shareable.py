"""From a linear layer to a head: what a head would drop is refused by its name, and what it takes over is shared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune
from torch.utils import hooks

from sftmix_kernels import LossHead
from sftmix_kernels.shareable import HOOKS
from tests.parity import make_case

ROOT = Path(__file__).resolve().parents[2]


def linear() -> nn.Linear:
    return nn.Linear(6, 11)


def of_instance(**attributes: Any) -> nn.Linear:
    layer = linear()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def old_forward() -> nn.Linear:
    layer = linear()
    own = layer.forward
    layer.forward = lambda hidden: 5 * own(hidden)  # type: ignore[method-assign, assignment]
    return layer


def offloaded() -> nn.Linear:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(linear())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model[0]  # type: ignore[return-value]


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: packed bytes, and a forward that unpacks them."""

    def __init__(self) -> None:
        super().__init__(6, 11)
        self.weight = nn.Parameter(torch.zeros(33, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Twice(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


class Packed(torch.Tensor):
    """A weight made of other tensors, as torchao's are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[no-any-return, attr-defined]

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    def __repr__(self) -> str:  # type: ignore[override]
        return "Packed()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


def of_torchao_kind() -> nn.Linear:
    layer = linear()
    layer.weight = nn.Parameter(Packed(torch.zeros(11, 6, dtype=torch.int8)), requires_grad=False)
    return layer


def dynamic() -> Any:
    return torch.ao.nn.quantized.dynamic.Linear(6, 11)


def managed() -> nn.Linear:
    """What fully_shard leaves on a layer that it manages within a larger unit."""
    return of_instance(_is_fsdp_managed_module=True)


def with_old_norm(norm: Callable[[nn.Linear], nn.Linear]) -> nn.Linear:
    with pytest.warns(FutureWarning):
        return norm(linear())


def without_parameter() -> nn.Linear:
    layer = linear()
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]
    return layer


def with_buffer() -> nn.Linear:
    layer = linear()
    layer.register_buffer("weight_scale", torch.ones(()))
    return layer


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another module": (nn.Identity, "expected an nn.Linear with its own forward, got Identity"),
    "no module": (lambda: torch.ones(3, 4), "expected an nn.Linear with its own forward, got Tensor"),
    "class forward": (lambda: Twice(6, 11), "expected an nn.Linear with its own forward, got Twice"),
    "own forward": (old_forward, "expected the forward of nn.Linear, got one put on this layer"),
    "offloaded": (offloaded, r"accelerate's \(AlignDevicesHook\), .*remove_hook_from_module"),
    "4 bits": (Linear4bit, "a floating-point weight, got a quantised Linear4bit; leave the output layer out"),
    "8-bit weight": (
        lambda: of_instance(weight=nn.Parameter(torch.zeros(11, 6).to(torch.float8_e4m3fn), requires_grad=False)),
        "got a quantised Linear",
    ),
    "torchao": (of_torchao_kind, "got a quantised Linear"),
    "torch.ao": (dynamic, "got a quantised Linear"),
    "parametrised": (
        lambda: parametrizations.weight_norm(linear()),
        r"expected a plain weight, got a layer whose weight is parametrised; .*remove_parametrizations",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(linear(), "weight", amount=0.5),
        r"a tensor computed from weight_orig; torch.nn.utils.prune.remove\(linear, 'weight'\)",
    ),
    "weight norm": (
        lambda: with_old_norm(nn.utils.weight_norm),
        r"computed from weight_g, weight_v; torch.nn.utils.remove_weight_norm",
    ),
    "spectral norm": (
        lambda: nn.utils.spectral_norm(linear()),
        r"computed from weight_orig; torch.nn.utils.remove_spectral_norm",
    ),
    "no parameter": (
        without_parameter,
        "expected the weight to be a parameter, got a tensor computed from something else",
    ),
    "managed": (managed, "expected a layer that FSDP2 does not manage yet, .*then call fully_shard"),
    "buffer": (
        with_buffer,
        "expected a layer of weight and bias, got one that also holds weight_scale",
    ),
    "adapter": (
        lambda: of_instance(adapter=nn.Linear(2, 2)),
        "expected a layer of weight and bias, got one that also holds adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_head_would_drop_is_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^linear: .*{message}"):
        LossHead.from_linear(make())


def answer(*args: Any) -> None:
    """A hook that changes nothing."""


@pytest.mark.parametrize("attribute", HOOKS)
def test_a_hook_of_any_kind_is_refused_and_one_that_is_gone_is_not(attribute: str) -> None:
    register = {
        "_state_dict_pre_hooks": "register_state_dict_pre_hook",
        "_state_dict_hooks": "register_state_dict_post_hook",
        "_load_state_dict_pre_hooks": "register_load_state_dict_pre_hook",
        "_load_state_dict_post_hooks": "register_load_state_dict_post_hook",
        "_backward_pre_hooks": "register_full_backward_pre_hook",
        "_backward_hooks": "register_full_backward_hook",
        "_forward_pre_hooks": "register_forward_pre_hook",
        "_forward_hooks": "register_forward_hook",
    }[attribute]
    layer = linear()
    handle: hooks.RemovableHandle = getattr(layer, register)(answer)
    with pytest.raises(
        ValueError, match=rf"linear: expected a layer without hooks, got {HOOKS[attribute]} \("
    ):
        LossHead.from_linear(layer)
    handle.remove()
    assert LossHead.from_linear(layer).weight is layer.weight


def test_every_kind_of_hook_that_torch_has_is_looked_for() -> None:
    flags = ("_with_kwargs", "_always_called")
    kinds = {name for name in vars(linear()) if name.endswith("_hooks") and not name.endswith(flags)}
    assert kinds == set(HOOKS)


def test_a_layer_on_meta_is_shared_before_its_values_come() -> None:
    """How large models are built: nothing is offloaded there, there is nothing yet."""
    layer = nn.Linear(6, 11, device="meta")
    head = LossHead.from_linear(layer, softcap=3.0)
    assert head.weight is layer.weight and head.weight.is_meta
    head.to_empty(device="cpu")
    torch.nn.init.normal_(head.weight)
    torch.nn.init.zeros_(head.bias)
    case = make_case(8, 11, 6)
    logits = 3.0 * torch.tanh(case.hidden @ head.weight.T / 3.0)
    expected = nn.functional.cross_entropy(logits, case.target)
    torch.testing.assert_close(head(case.hidden, case.target).loss, expected)


def test_a_head_given_for_a_layer_does_not_lose_its_cap() -> None:
    head = LossHead(6, 11, softcap=3.0, logit_scale=0.5)
    with pytest.raises(ValueError, match=r"softcap: expected that of the LossHead given, 3.0, got None"):
        LossHead.from_linear(head, logit_scale=0.5)
    with pytest.raises(ValueError, match=r"logit_scale: expected that of the LossHead given, 0.5, got 1.0"):
        LossHead.from_linear(head, softcap=3.0)
    other = LossHead.from_linear(head, softcap=4.0, logit_scale=0.5)
    assert other.weight is head.weight and (other.softcap, other.logit_scale) == (4.0, 0.5)
    assert LossHead.from_linear(LossHead(6, 11)).softcap is None


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_frozen_parameters_stay(training: bool) -> None:
    layer = linear().requires_grad_(False).train(training)
    head = LossHead.from_linear(layer)
    assert head.training == training and not head.weight.requires_grad and not head.bias.requires_grad


SHARDED = """
import copy, pytest, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from sftmix_kernels import LossHead
mesh = init_device_mesh("cpu", (1,))
model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 11))
fully_shard(model[1], mesh=mesh)
fully_shard(model, mesh=mesh)
for layer in model:
    with pytest.raises(ValueError, match="linear: expected a layer that FSDP2 does not manage yet"):
        LossHead.from_linear(layer)
spread = torch.nn.Linear(6, 11, bias=False)
spread.weight = torch.nn.Parameter(distribute_tensor(spread.weight.detach(), mesh, [Shard(0)]))
head = LossHead.from_linear(spread)  # a vocabulary's shard, for vocab_parallel
assert type(head.weight) is DTensor and head.weight is spread.weight
hidden, target = torch.randn(5, 6), torch.randint(11, (5,))
loss = head(hidden, target, vocab_parallel=mesh).loss
expected = torch.nn.functional.cross_entropy(hidden @ head.weight.full_tensor().T, target)
torch.testing.assert_close(loss, expected)
dist.destroy_process_group()
"""


def test_a_layer_under_fsdp2_is_refused_and_a_shard_of_the_vocabulary_is_shared() -> None:
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
