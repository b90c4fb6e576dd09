"""An adapter as files of peft: written for ``PeftModel.from_pretrained``, and merged into a plain causal LM."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from sftmix.model.merge import Rounding, active_adapters, merge_plan, merge_weight, plain_name
from sftmix.model.parallel import whole
from sftmix.rank import is_main

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

PREFIX = "base_model.model."  # peft's own, before the causal LM's names
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = "default"


def save_adapter(model: SFTMixModel, folder: str | Path, base_name: str) -> None:
    """Write the active adapter and the modules trained whole into ``folder``, as peft writes them.

    Adapters are float32, whole modules have the model's dtype. A sharded model is gathered by all processes together;
    the first one writes. Raises ``ValueError`` for several active adapters.
    """
    state, config, folder = _adapter_state(model), _adapter_config(model, base_name), Path(folder)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{WEIGHTS}.tmp"
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.rename(folder / WEIGHTS)
        config.save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()


def check_adapter(model: SFTMixModel) -> None:
    """Raise ``ValueError`` unless peft would load what ``save_adapter`` writes onto the same weights.

    peft is asked to, with a copy of the model without values: it renames targets of some mixtures of experts.
    """
    state = _adapter_state(model)
    with torch.device("meta"):
        plain = type(model.base)(copy.deepcopy(model.base.config))
    try:
        _load(plain, _adapter_config(model, ""), state, low_cpu_mem_usage=True)
        wrong = _difference(model.base, plain)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"export: expected merged, got an adapter that peft loads onto other weights of {type(plain).__name__} "
            f"than it was trained on ({' '.join(wrong.split())[:200]}); it renames targets of mixtures of experts"
        )


def _difference(trained: nn.Module, loaded: nn.Module) -> str | None:
    """The first adapter parameter of either model that the other has not, or has in another shape."""
    found, wanted = (
        {f"{name} of shape {list(w.shape)}" for name, w in base.named_parameters() if ".lora_" in name}
        for base in (loaded, trained)
    )
    layers, others = (merge_plan(base).layers.keys() for base in (trained, loaded))
    return next(iter(sorted(found ^ wanted) or sorted(layers ^ others)), None)


@torch.no_grad()
def merge_adapter(causal_lm: Any, folder: str | Path) -> Any:
    """Add an adapter's files to a plain causal LM, in place, in float32, rounded once; returns the plain model.

    Raises ``ValueError`` for an adapter that is not LoRA, does not fit the model, or cannot be merged.
    """
    from peft import PeftConfig, load_peft_weights

    config = PeftConfig.from_pretrained(str(folder))
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"model.name: expected a LoRA adapter in {folder}, got {config.peft_type}")
    ties = _ties(causal_lm)
    mode = causal_lm.training
    trained = {name for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    try:
        wrapped = _load(causal_lm, config, load_peft_weights(str(folder), device="cpu"))
    except (RuntimeError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"model.name: expected the adapter in {folder} to fit its base: {why}") from error
    rounding = Rounding()
    for name, layer in merge_plan(causal_lm).layers.items():
        if active_adapters(layer):
            weight = getattr(layer.get_base_layer(), name.rpartition(".")[2])
            weight.copy_(merge_weight(layer, weight, rounding))
    rounding.say("adapter")
    plain = wrapped.unload()
    tensors = plain.state_dict()
    for first, second in ties:
        if not torch.equal(tensors[first], tensors[second]):
            raise ValueError(
                f"model.name: expected the adapter in {folder} to keep {first} and {second} equal, which "
                f"{type(plain).__name__} ties"
            )
    plain.tie_weights()
    for name, weight in plain.named_parameters():
        weight.requires_grad_(name in trained)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain.train(mode)


def _ties(causal_lm: Any) -> list[tuple[str, str]]:
    """Pairs of names that stand for one parameter."""
    first: dict[int, str] = {}
    named = causal_lm.named_parameters(remove_duplicate=False)
    return [(first[id(w)], name) for name, w in named if first.setdefault(id(w), name) != name]


def _load(causal_lm: Any, config: Any, state: dict[str, Tensor], **options: Any) -> Any:
    """The peft model around ``causal_lm`` with an adapter's values; every one of them must have found its place."""
    from peft import get_peft_model, set_peft_model_state_dict

    config = copy.deepcopy(config)
    with _quiet(), torch.random.fork_rng():
        wrapped = get_peft_model(causal_lm, config, adapter_name=ADAPTER, **options)
        result: Any = set_peft_model_state_dict(wrapped, state, adapter_name=ADAPTER, **options)
    missing = [key for key in result.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    if missing or result.unexpected_keys:
        what = f"{missing[0]} has no value" if missing else f"{result.unexpected_keys[0]} has no place"
        raise ValueError(f"adapter: expected its weights to fit {type(causal_lm).__name__}, but {what}")
    return wrapped


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings, of which those that matter are looked at here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _active(model: SFTMixModel) -> str:
    wrapped: Any = model.model
    names = list(wrapped.active_adapters)
    if len(names) != 1:
        raise ValueError(f"export: expected one active adapter to write, got {', '.join(names) or 'none'}")
    return str(names[0])


def _adapter_state(model: SFTMixModel) -> dict[str, Tensor]:
    """What peft keeps of a model, under peft's names, whole and on the CPU; collective when it is sharded."""
    from peft import get_peft_model_state_dict

    gathered: dict[str, Tensor] = {}
    for name, tensor in model.base.state_dict().items():
        if ".lora_" in name:
            gathered[f"{PREFIX}{name}"] = whole(tensor).cpu()
    state = get_peft_model_state_dict(
        model.model, state_dict=gathered, adapter_name=_active(model), save_embedding_layers=False
    )
    for name, weight in model.base.named_parameters(remove_duplicate=False):
        if weight.requires_grad and ".lora_" not in name:
            plain = plain_name(name)
            state[f"{PREFIX}{plain}"] = whole(weight).to(model.dtypes[plain]).cpu()
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _adapter_config(model: SFTMixModel, base_name: str) -> Any:
    """peft's configuration of the active adapter, of the base model ``base_name``, to be read for inference."""
    wrapped: Any = model.model
    config = copy.deepcopy(wrapped.peft_config[_active(model)])
    config.base_model_name_or_path, config.inference_mode = base_name, True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or [])
    config.target_parameters = sorted(config.target_parameters or []) or None
    config.modules_to_save = whole_modules(model.base) or None
    return config


def whole_modules(base: nn.Module) -> list[str]:
    """Names of the modules that hold a parameter trained without an adapter; a tie makes both its modules such."""
    return [
        name
        for name, module in base.named_modules()
        if ".lora_" not in name and any(weight.requires_grad for weight in module.parameters(recurse=False))
    ]
