"""What two processes of torchrun do for ``test_fsdp``: train sharded by accelerate's FSDP2, save, and resume.

accelerate takes its FSDP plugin for GPUs and the like alone: ``AcceleratorState.__init__`` asks what kind of devices
are distributed. Here a CPU is let in; all that follows, its wrapping, clipping, saving and reading, is accelerate's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from sftmix_kernels import LossHead
from tests.recipe import tiny
from tests.recipe.trl.small import dataset, trainer

SETTINGS = {
    "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False,
    "reshard_after_forward": True,
}  # fmt: skip
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # a model, and a trainer's options
    "untied": ("llama", {}),
    "tied": ("qwen3", {"gradient_checkpointing": True}),
    "capped": ("gemma2", {"mixup_lam": "token"}),
    "bfloat16": ("llama", {"bf16": True}),
    "lora": ("llama", {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}),
}
_init = AcceleratorState.__init__
_forward = LossHead.forward
_seen: list[dict[str, Any]] = []


def _with_cpus(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


def _watched(self: Any, hidden: Any, target: Any = None, **options: Any) -> Any:
    """The head's forward, and what it was given of a step."""
    if target is not None and "lam" in options and options["lam"].numel():
        weight = self.weight
        told = {"lam": options["lam"].clone(), "hidden": hidden.dtype, "weight": weight.dtype}
        told |= {"is_whole": not isinstance(weight, DTensor) and tuple(weight.shape) == (tiny.VOCAB, 16)}
        _seen.append(told | {"denominators": (options["ntp_denominator"], options["mixup_denominator"])})
    return _forward(self, hidden, target, **options)


def whole(model: Any) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items()}


def made(out: Path, way: str, **changes: Any) -> Any:
    """The trainer of a way, on 24 examples."""
    kind, options = WAYS[way]
    examples = tiny.examples(24, longest=20)
    torch.manual_seed(0)  # peft draws adapters
    told = {"split": tiny.halves(examples), **options, **changes}
    if "reference" in told:
        del told["split"]
    return trainer(out, model=tiny.causal_lm(kind), rows=dataset(examples), **told)


def sharded(out: Path, way: str, state: str = "FULL_STATE_DICT", **changes: Any) -> Any:
    told = {
        "fsdp": True,
        "fsdp_config": {**SETTINGS, "state_dict_type": state},
        "per_device_train_batch_size": 2,
    }
    return made(out, way, **{**told, **changes})


def keep(out: Path, name: str, found: Any, **more: Any) -> None:
    """Leave what a training ended in; an evaluation after it, which leaves the head unsharded, is the last thing."""
    kinds = {type(p).__name__ for p in found.model.parameters()}
    kept = {"weights": whole(found.model), "log": found.state.log_history, "rows": found.dynamics_rows}
    kept |= {"kinds": kinds, "is_fsdp2": found.accelerator.is_fsdp2, **more}
    kept["eval_loss"] = found.evaluate(found.train_dataset)["eval_loss"]
    if dist.get_rank() == 0:
        torch.save(kept, out / f"{name}.pt")


def main(out: Path) -> None:
    AcceleratorState.__init__ = _with_cpus
    LossHead.forward = _watched
    for way in WAYS:
        _seen.clear()
        found = sharded(out / way, way)
        found.train()
        seen = list(_seen)
        found.save_model(str(out / way / "model"))
        keep(out, way, found, seen=seen)
    for state in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        told = {"state": state, "save_strategy": "steps", "save_steps": 1}
        first = sharded(out / state, "untied", **told)
        first.train()
        again = sharded(out / f"{state}-again", "untied", **told)
        again.train(resume_from_checkpoint=str(out / state / "checkpoint-4"))
        keep(out, state, again)
    try:
        sharded(out / "online", "untied", reference="online").train()
    except ValueError as error:
        if dist.get_rank() == 0:
            (out / "online.txt").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
