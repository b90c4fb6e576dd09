"""What test_splits runs under torchrun: one global batch, split over processes and micro-batches in every way.

A way gives the losses of a step and its gradients, whole, before they are clipped. Written by rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sftmix.config import LoraConfig
from sftmix.model.lora import apply_lora
from sftmix.model.parallel import join_world, whole
from sftmix.training import trainer as trainer_module
from sftmix.training.checkpoint import complete_checkpoints
from sftmix.training.metrics import read_metrics
from sftmix.training.runs import train_pairs
from sftmix.training.signals import Stopped
from sftmix.training.trainer import Trainer
from tests.recipe import tiny

# 23 examples: an odd one without a partner. Steps of 12 and 11 sequences.
EXAMPLES = tiny.examples(23, longest=20)
MICRO = (2, 4, 12)
# By name: architecture, tuning, flags. Chunks of 12 leave three of four processes without a token.
CASES: dict[str, tuple[str, str, list[str]]] = {
    "untied": ("llama", "full", []),
    "tied": ("qwen3", "full", []),
    "lora": ("llama", "lora", []),
    "weighted": ("llama", "full", ["weighted"]),
    "exchange": ("llama", "full", ["train.head_sharding=exchange"]),
    "recomputed": ("llama", "full", ["train.gradient_checkpointing=full"]),
    "selective": ("llama", "full", ["train.gradient_checkpointing=selective"]),
    "compiled": ("llama", "full", ["train.compile=true"]),
    "lambda per token": ("llama", "full", ["mixup.lam=token"]),
}
REPLICATED = ("untied", "tied", "lora")


def split(case: str, micro: int, folder: Path, *flags: str) -> dict[str, Any]:
    """Loss parts and gradients of the first step, and the losses of the next ones."""
    kind, tuning, own = CASES[case]
    own = [flag for flag in own if flag != "weighted"]
    found = tiny.weighted(dict(EXAMPLES)) if case == "weighted" else EXAMPLES
    model = tiny.model(kind)
    if tuning == "lora":
        apply_lora(model, LoraConfig(rank=4))
        with torch.no_grad():  # B begins at zero, and with it the gradient of A
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    config = tiny.config(
        "train.batch_size=12", f"train.micro_batch_size={micro}", f"train.tuning={tuning}", "train.max_steps=3",
        "optim.eps=1e-3", *own, *flags,
    )  # fmt: skip
    kept: dict[str, torch.Tensor] = {}
    real = trainer_module.clip_gradients

    def look(weights: Any, max_norm: float) -> torch.Tensor:
        if not kept:
            for name, master in weights.masters.items():
                grad = torch.zeros_like(master) if master.grad is None else master.grad
                kept[name] = whole(grad).clone()
        return real(weights, max_norm)

    trainer_module.clip_gradients = look
    try:
        train_pairs(config, model, found, tiny.halves(dict(found)), folder=folder)
    finally:
        trainer_module.clip_gradients = real
    records = (
        read_metrics(folder / "metrics.jsonl") if not dist.is_initialized() or dist.get_rank() == 0 else []
    )
    parts = [[record[key] for key in ("loss", "ntp_loss", "mixup_loss", "grad_norm")] for record in records]
    saved = complete_checkpoints(folder / "checkpoints")[-1] if records else None
    return {"gradients": kept, "parts": parts, "checkpoint": str(saved)}


def disturbed(folder: Path, what: str) -> dict[str, Any]:
    """The second process alone is disturbed in its second step: a signal, or a loss that is not a number."""
    real, calls = Trainer._loss, [0]

    def disturb(self: Trainer, *args: Any, **options: Any) -> Any:
        result = real(self, *args, **options)
        if self.step == 1 and dist.get_rank() == 1 and not calls[0]:
            calls[0] = 1
            if what == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                return result._replace(loss=result.loss * float("nan"))
        return result

    Trainer._loss = disturb  # type: ignore[method-assign]
    code: Any = 0
    try:
        found = split("untied", 2, folder, "train.checkpoint_every=1 h")
    except Stopped as stopped:
        code, found = stopped.code, {}
    finally:
        Trainer._loss = real  # type: ignore[method-assign]
    codes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(codes, code)
    return {"codes": codes, **found}


def waits() -> list[float]:
    """Seconds that a process waits for the others, in every group that there is."""
    device = torch.device("cpu")
    return [
        group._get_backend(device).options._timeout.total_seconds()
        for group in distributed_c10d._world.pg_map
    ]


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    world = join_world(torch.device("cpu"))
    for case in CASES:
        for micro in MICRO if case in ("untied", "lora") else MICRO[:1]:
            results[f"{case}-{micro}"] = split(case, micro, out / f"{case}-{micro}")
    if world.size == 4:
        for case in REPLICATED:
            name = f"replicas {case}"
            results[name] = split(case, 2, out / name, "train.replicas=2")
    beside = "train.async_checkpoint=true", "train.checkpoint_every=1 step"
    results["beside"] = split("untied", 2, out / "beside", *beside)
    for what in ("signal", "nan"):
        results[what] = disturbed(out / what, what)
    results["waits"] = waits()
    if dist.get_rank() == 0:
        torch.save(results, out / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
