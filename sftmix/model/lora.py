"""LoRA adapters (peft) on the linear layers and fused experts of the decoder's blocks and, where named, on the head.

The frozen base keeps its dtype, the adapters are float32. The head's forward is the loss, so its adapter goes
into the loss as two factors; all-linear leaves it out. Blocks below the first adapted one record no graph, so
training only upper layers is cheaper. What peft made is compared with what was asked for before anything is trained.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sftmix.config import LoraConfig
from sftmix.model.merge import merge_plan
from sftmix.model.probe import probe_ids
from sftmix.model.quantised import dequantised, has_8_bits, is_quantised, numbers
from sftmix.model.targets import (
    ALL_LINEAR,
    Targets,
    decoder_blocks,
    expert_names,
    find_targets,
    find_whole,
    is_lora,
)  # fmt: skip
from sftmix.progress import say
from sftmix_kernels import adapt_head

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

__all__ = [
    "ADAPTER",
    "TrainedShare",
    "apply_lora",
    "decoder_blocks",
    "find_targets",
    "is_lora",
    "trained_share",
]

ADAPTER = "default"


def apply_lora(model: SFTMixModel, lora: LoraConfig, *, seed: int = 0, export: str = "merged") -> SFTMixModel:
    """Freeze the model, add float32 adapters in place, and return it; ``seed`` decides their first values.

    Says what share of the parameters trains. ``export`` is the knob of that name: an adapter that peft would not load
    is refused here. Raises ``ValueError`` for what ``find_targets`` and ``find_whole`` refuse, and when what peft made
    is not what was asked for or could not be exported.
    """
    if lora.dora and model.device.type == "cpu" and any(has_8_bits(part) for part in model.modules()):
        raise ValueError(
            "lora.dora: expected false with an 8-bit base on a CPU, got true: peft's DoRA loses the scales there"
        )
    targets = find_targets(model, lora)
    whole = find_whole(model, lora, targets)
    names = set(merge_plan(model.base).sources)
    mode = model.training
    _inject(model, lora, targets)
    _check_made(model, targets, names)
    adapt_head(model.head)
    _initialise(model, seed)
    for name in whole:
        model.base.get_submodule(name).requires_grad_()
    merge_plan(model.base)
    model.train(mode)  # peft's new dropout layers would be in training mode
    _check_reached(model)
    if export != "merged":
        from sftmix.model.adapter import check_adapter

        check_adapter(model)
    say(str(trained_share(model)))
    _say_left_out(lora, targets)
    return model


def _say_left_out(lora: LoraConfig, targets: Targets) -> None:
    """A line for what all-linear does not adapt."""
    if ALL_LINEAR not in [name.strip() for name in lora.target_modules.split(",")]:
        return
    if targets.unadapted:
        say(
            f"lora: all-linear leaves out the weights of fused experts; lora.target_modules={lora.target_modules},"
            f"{expert_names(targets.unadapted)} adapts them"
        )
    if targets.bypassed:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in targets.bypassed}))
        say(f"lora: all-linear leaves out {names}, whose weight the model reads past the layer")
    if targets.shared:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in targets.shared}))
        say(f"lora: all-linear leaves out {names} of {len(targets.shared)} layers that share their weights")


def _inject(model: SFTMixModel, lora: LoraConfig, targets: Targets) -> None:
    """Let peft put its layers around the targets."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        bias="none",
        # peft's class for it takes a model's way of generating, which code of its own may not have.
        task_type="CAUSAL_LM" if hasattr(model.base, "prepare_inputs_for_generation") else None,
        # Conv1D (GPT-2) keeps its weight transposed.
        fan_in_fan_out=any(isinstance(model.base.get_submodule(name), Conv1D) for name in targets.modules),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    # Whatever peft draws, our caller's generator stays put; peft asks transformers for an attribute it renamed.
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), _names_as_given():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="target_modules=.* were set but no module")
        try:
            model.model = get_peft_model(model.base, peft_config, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(
                f"lora.target_modules: expected targets that peft adapts, got {error}"
            ) from error


@contextmanager
def _names_as_given() -> Iterator[None]:
    """Keep peft from rewriting target names inside the block.

    It takes names such as ``down_proj`` for those of unfused experts in older transformers, turns them into parameters
    and drops the modules that bear them now. There is no option against it; the names here are those of this model.
    """
    name = "convert_peft_config_for_transformers"
    found = importlib.util.find_spec("peft.utils.transformers_weight_conversion")
    conversion = importlib.import_module(found.name) if found else None
    if not hasattr(conversion, name):  # versions of peft that rewrite nothing; _check_made holds it
        yield
        return
    original = getattr(conversion, name)
    setattr(conversion, name, lambda *args, **options: None)
    try:
        yield
    finally:
        setattr(conversion, name, original)


def _check_made(model: SFTMixModel, targets: Targets, names: set[str]) -> None:
    """Compare peft's layers with the wanted ones, and the names of the merged weights with those before."""
    plan = merge_plan(model.base)
    made, wanted = set(plan.layers), targets.weights()
    if made != wanted:
        wrong = [f"no adapter on {name}" for name in sorted(wanted - made)]
        wrong += [f"an adapter on {name}" for name in sorted(made - wanted)]
        raise ValueError(
            f"lora.target_modules: expected peft to adapt {len(wanted)} weights, got {'; '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more differences" if len(wrong) > 3 else "")
        )
    if set(plan.sources) != names:
        odd = sorted(set(plan.sources) ^ names)
        raise ValueError(f"model: expected the merged weights to have the model's names, got {odd[0]}")
    wide = [
        name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name
    ]
    narrow = [
        name
        for name, weight in model.named_parameters()
        if ".lora_" in name and weight.dtype != torch.float32
    ]
    if wide or narrow:
        raise ValueError(f"lora: expected float32 adapters on a frozen model, got {(wide or narrow)[0]}")


def _check_reached(model: SFTMixModel) -> None:
    """The loss must depend on what is trained: layers with a backward of their own may cut adapters off."""
    ids = probe_ids(model.vocab_size, model.device)[:1]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        logits = model.logits(ids)
    if not logits.requires_grad:
        raise ValueError(
            f"train.tuning: expected full, got lora, whose adapters the loss of {type(model.base).__name__} does not "
            "reach: its layers compute their gradients themselves"
        )


@torch.no_grad()
def _initialise(model: SFTMixModel, seed: int) -> None:
    """First values of the adapters, drawn on the CPU as peft does it: the same on every device and process.

    DoRA's magnitude is the norm of the weight's rows in float32, in which peft's forward takes it too: the adapted
    model begins as the base model.
    """
    if model.device.type == "meta":  # a plan's model: shapes have no values
        return
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = nn.init.kaiming_uniform_(
                torch.empty(parameter.shape), a=math.sqrt(5), generator=generator
            )
            parameter.copy_(drawn)
    for layer in merge_plan(model.base).layers.values():
        for vector in (getattr(layer, "lora_magnitude_vector", None) or {}).values():
            own = layer.get_base_layer()
            weight = dequantised(own, torch.float32) if is_quantised(own) else own.weight.float()
            vector.weight.copy_(torch.linalg.norm(weight.T if layer.fan_in_fan_out else weight, dim=1))


@dataclass(frozen=True)
class TrainedShare:
    """Counts of parameters; one that stands in several places (a tied head) counts once."""

    trainable: int
    total: int  # adapters included
    adapted: int  # of the blocks' own weights, those with an adapter
    blocks: int  # the blocks' own parameters, without adapters
    head: bool  # whether the head has an adapter
    whole: tuple[str, ...]  # names of the parameters that train without an adapter

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        shown = f"{share:.1f}" if share >= 1 else f"{share:.2g}"
        text = f"lora: {self.trainable:,} parameters train, {shown} % of {self.total:,}"
        text += f"; adapters on {self.adapted:,} of the blocks' {self.blocks:,} parameters"
        text += " and on the head" if self.head else ""
        if not self.whole:
            return text
        shown = ", ".join(self.whole[:4]) + (
            f" and {len(self.whole) - 4} more" if len(self.whole) > 4 else ""
        )
        return f"{text}; trained whole: {shown}"


def trained_share(model: SFTMixModel) -> TrainedShare:
    """How many parameters train, and how many of the blocks' weights carry an adapter."""
    parameters: dict[str, Any] = dict(model.base.named_parameters())
    blocks = {id(weight) for block in decoder_blocks(model)[1] for weight in block.parameters()}
    own = {
        name: weight for name, weight in parameters.items() if ".lora_" not in name and id(weight) in blocks
    }
    plan = merge_plan(model.base)
    adapted = {plan.sources[name] for name in plan.layers}
    return TrainedShare(
        trainable=sum(numbers(weight) for weight in parameters.values() if weight.requires_grad),
        total=sum(numbers(weight) for weight in parameters.values()),
        adapted=sum(numbers(weight) for name, weight in own.items() if name in adapted),
        blocks=sum(numbers(weight) for weight in own.values()),
        head=any(module is model.head for module in plan.layers.values()),
        whole=tuple(
            name for name, weight in parameters.items() if weight.requires_grad and ".lora_" not in name
        ),
    )
