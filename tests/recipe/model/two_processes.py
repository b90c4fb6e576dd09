"""What test_parallel runs under torchrun: every scenario on two gloo processes, results written by rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sftmix_kernels.head as head_module
from sftmix.config import LoraConfig
from sftmix.evaluation.figures import evaluate_model
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.export import merge_and_export
from sftmix.model.lora import apply_lora
from sftmix.model.parallel import join_world, shard
from sftmix.training.checkpoint import save_trainable
from sftmix.training.plan import Examples
from sftmix.training.runs import train_pairs, train_plain
from sftmix.training.trainer import Trainer
from tests.recipe import tiny

KINDS = ("llama", "qwen3")  # untied, tied
METHODS = ("ntp", "sftmix")
DTYPES = ("float32", "bfloat16")
# Dropout; an auxiliary loss; parameters that stay float32 in a bfloat16 model.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "ernie4_5_moe": {},
}
# After the first step a master within 1e-7 of a tie may round to another bfloat16 weight on the other road, and one
# weight's last digit moves an expert's later gradients by more than sums in another order do.
STEPS = {"ernie4_5_moe": ("train.max_steps=1",)}
# 22 examples: steps of 8, 8 and 6 sequences; micro-batches of 2 leave a process idle in the last round.
NUM_EXAMPLES = 22
# Modules trained whole beside adapters: a unit of their own each, those of a tie in the root's.
WHOLE = {"llama": "embed_tokens,lm_head,norm,input_layernorm", "qwen3": "embed_tokens,layers.1"}
FLAGS = ("train.micro_batch_size=2", "optim.eps=1e-5", "train.max_steps=4")


def examples() -> Examples:
    return tiny.examples(NUM_EXAMPLES)


def train(
    kind: str,
    method: str,
    dtype: str,
    folder: Path,
    *flags: str,
    progress: Any = None,
    weighted: bool = False,
    lora: LoraConfig | None = None,
    **options: Any,
) -> tuple[SFTMixModel, Trainer]:
    """A few steps of pairs; the same call in one process and in two."""
    config = tiny.config(*FLAGS, f"train.method={method}", *flags)
    model = tiny.model(kind, dtype=getattr(torch, dtype), **options)
    if config.train.tuning == "lora":
        apply_lora(model, lora or LoraConfig(rank=4))
    found = tiny.weighted(dict(examples())) if weighted else examples()
    halves = tiny.halves(dict(found))
    trainer = train_pairs(config, model, found, halves, folder=folder, progress=progress)
    return model, trainer


def whole_beside(kind: str) -> LoraConfig:
    """Adapters on the first block, and modules trained whole."""
    return LoraConfig(rank=4, target_modules="q_proj,up_proj", layers="0:1", modules_to_save=WHOLE[kind])


def arrivals(model: SFTMixModel) -> dict[str, Any]:
    """What the loss receives when the head is called under the bfloat16 policy, and the loss it gives."""
    seen: dict[str, Any] = {}
    inner = head_module.sftmix_loss

    def record(hidden: Any, weight: Any, target: Any, lam: Any, **options: Any) -> Any:
        seen.update(options, lam=lam.clone(), hidden_dtype=hidden.dtype, weight_dtype=weight.dtype)
        return inner(hidden, weight, target, lam, **options)

    head_module.sftmix_loss = record  # type: ignore[assignment]
    ids = torch.arange(8, 20).view(1, -1)
    rows, lam = torch.arange(11), torch.tensor([0.123456789, 1 / 3, 2 / 3, 0.987654321])
    sent = {"row_weight": torch.linspace(0.1, 1.1, 11), "pair_weight": torch.linspace(0.3, 0.7, 4)}
    sums: dict[str, Any] = {"ntp_denominator": 3001.123456789, "mixup_denominator": 1001, **sent}
    result = model(ids, torch.ones_like(ids), rows, ids[0, 1:], lam, mixup_weight=0.2, **sums)
    head_module.sftmix_loss = inner
    ntp = (sent["row_weight"].double() * result.nll).sum() / 3001.123456789
    expected = ntp + 0.2 * (sent["pair_weight"].double() * result.mixup_nll).sum() / 1001
    sent["lam"] = lam
    return {**seen, "sent": sent, "loss": result.loss.item(), "expected": expected.item()}


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    for kind in KINDS:
        for dtype in DTYPES:
            for method in METHODS:
                name = f"{kind}-{method}-{dtype}"
                model, _ = train(kind, method, dtype, out / name)
                save_trainable(model, out / name / "weights")
    results["evaluation"] = evaluate_model(model, list(examples().values()))
    merge_and_export(model, tiny.tokenizer(), out / "export")
    model, _ = train("llama", "sftmix", "bfloat16", out / "weighted", weighted=True)
    save_trainable(model, out / "weighted" / "weights")
    model, trainer = train("llama", "sftmix", "float32", out / "resumed")  # one process did its first epoch
    save_trainable(model, out / "resumed" / "weights")
    results["steps after resuming"] = trainer.step - trainer.first_step
    for kind, options in OTHERS.items():
        model, _ = train(kind, "sftmix", "bfloat16", out / f"other-{kind}", *STEPS.get(kind, ()), **options)
        save_trainable(model, out / f"other-{kind}" / "weights")
        merge_and_export(model, tiny.tokenizer(), out / f"other-{kind}" / "export")
    for dtype in DTYPES:
        model, _ = train("llama", "sftmix", dtype, out / f"lora-{dtype}", "train.tuning=lora")
        save_trainable(model, out / f"lora-{dtype}" / "weights")
        merge_and_export(model, tiny.tokenizer(), out / f"lora-{dtype}" / "export")
    for kind in KINDS:
        model, _ = train(
            kind, "sftmix", "bfloat16", out / f"whole-{kind}", "train.tuning=lora", lora=whole_beside(kind)
        )
        save_trainable(model, out / f"whole-{kind}" / "weights")
        merge_and_export(model, tiny.tokenizer(), out / f"whole-{kind}" / "export")
    config = tiny.config("train.micro_batch_size=2", "reference.epochs=1")
    results["online"] = train_plain(config, tiny.model("llama"), examples(), folder=out / "plain")
    world = join_world(torch.device("cpu"))
    sharded = shard(tiny.model("llama", dtype=torch.bfloat16), world)
    results["arrivals"] = arrivals(sharded)
    results["world"] = world.size
    if dist.get_rank() == 0:
        torch.save(results, out / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
