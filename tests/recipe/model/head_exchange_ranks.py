"""What test_head_exchange runs under torchrun: the same steps with a gathered and an exchanged head, on two ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sftmix.evaluation.figures import evaluate_model
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.export import merge_and_export
from sftmix.model.head_exchange import ExchangedHead
from sftmix.model.parallel import barrier, join_world, shard, whole
from sftmix.training.checkpoint import save_trainable
from sftmix.training.runs import train_pairs
from tests.recipe import tiny
from tests.recipe.model.two_processes import examples

MODES = ("gather", "exchange")
# Adam divides by sqrt(v) + eps: with an eps far under the gradients' rounding it would enlarge that.
FLAGS = ("train.micro_batch_size=2", "train.method=sftmix", "optim.eps=1e-2")


def model_of(mode: str | None, dtype: str = "float32") -> SFTMixModel:
    model = tiny.model("llama", dtype=getattr(torch, dtype))
    return model if mode is None else shard(model, join_world(model.device), head_sharding=mode)


def train(mode: str | None, folder: Path, *flags: str, progress: Any = None) -> SFTMixModel:
    """Steps of 8, 8 and 6 examples in micro-batches of 2, so that one process has none in the last round."""
    model = model_of(mode)
    halves = tiny.halves(dict(examples()))
    config = tiny.config(*FLAGS, *flags)
    train_pairs(config, model, examples(), halves, folder=folder, progress=progress)
    return model


def gradients(
    model: SFTMixModel, parts: tuple[int, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Gradients of the losses of ``parts``, of ragged rows and pairs; part 2 has no pair, part 3 no row."""
    if dtype is not None:
        model = model.to(dtype)
    for part in parts:
        ids = torch.arange(8 + part, 20 + part).view(1, -1)
        num_rows = (11, 8, 5, 0)[part]
        lam = torch.tensor([0.3, 0.6, 0.2, 0.9])[: (4, 1, 0, 0)[part]]
        out = model(
            ids, torch.ones_like(ids), torch.arange(num_rows), ids[0, 1 : 1 + num_rows], lam,
            mixup_weight=0.2, ntp_denominator=24, mixup_denominator=5,
        )  # fmt: skip
        out.loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def placement(model: SFTMixModel) -> dict[str, Any]:
    """What stands at the head, before, in and after a forward pass."""
    seen: dict[str, Any] = {"is exchanged": isinstance(model.head, ExchangedHead)}

    def look(head: Any, args: Any, kwargs: Any) -> None:
        seen["in the forward"] = isinstance(head.weight, DTensor), tuple(args[0].shape), args[0].dtype

    handle = model.head.register_forward_pre_hook(look, with_kwargs=True)
    found = gradients(model, (dist.get_rank(),))
    handle.remove()
    weight: Any = model.head.weight
    seen["local"], seen["local gradient"] = weight.to_local().shape, weight.grad.to_local().shape
    seen["dtypes"] = weight.dtype, weight.grad.dtype
    seen["memory"] = weight.to_local().untyped_storage().nbytes()
    return {**seen, "names": list(found)}


def main(out: Path) -> None:
    world = join_world(torch.device("cpu"))
    results: dict[str, Any] = {}
    for mode in MODES:
        model = train(mode, out / mode, "train.max_steps=2")
        save_trainable(model, out / mode / "weights")
        results[mode, "evaluation"] = evaluate_model(model, list(examples().values()))
        with torch.no_grad():
            results[mode, "logits"] = model.logits(torch.arange(8, 20 + 2 * world.rank).view(1, -1))[:, :12]
        for dtype in ("float32", "bfloat16"):
            parts = (0, 2) if world.rank == 0 else (1, 3)
            results[mode, dtype] = gradients(model_of(mode, dtype), parts)
    results["placement"] = placement(model_of("exchange", "bfloat16"))
    merge_and_export(model, tiny.tokenizer(), out / "export")
    for mode in MODES:  # the first three steps exchanged, the last one gathered, and as it began
        train(mode if mode == "exchange" else "exchange", out / f"resumed-{mode}", "train.max_steps=4")
        barrier()
        if world.rank == 0:
            shutil.rmtree(out / f"resumed-{mode}" / "checkpoints" / "step-00000004")
        barrier()
        model = train(mode, out / f"resumed-{mode}", "train.max_steps=4")
        save_trainable(model, out / f"resumed-{mode}" / "weights")
    for rows in (1, 1000):
        chosen = shard(tiny.model("llama"), world, head_sharding="auto", rows=rows)
        results["auto", rows] = isinstance(chosen.head, ExchangedHead)
    torch.save(results, out / f"rank{world.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
