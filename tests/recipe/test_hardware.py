"""GPUs by the names that drivers give, and flops against torch's own count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sftmix.config import LoraConfig
from sftmix.hardware import gpu_of
from sftmix.model.flops import ModelFlops
from sftmix.model.lora import apply_lora
from sftmix.training.metrics import read_metrics
from sftmix.training.runs import train_pairs
from tests.recipe import tiny


@pytest.mark.parametrize(
    "name, expected",
    [("NVIDIA H100 80GB HBM3", "H100-80"), ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA H200", "H200"),
     ("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX4090"),
     ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("Tesla T4", None),
     ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX4090")],
)  # fmt: skip
def test_a_gpu_is_known_by_its_drivers_name(name: str, expected: str | None) -> None:
    found = gpu_of(name)
    assert (found and found.name) == expected


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_flops_are_those_that_torch_counts(tuning: str) -> None:
    """One sequence of 14 tokens, eager attention, the loss by plain logits; frozen matrices have no gradient."""
    model = tiny.model(attn_implementation="eager")
    if tuning == "lora":
        apply_lora(model, LoraConfig(rank=2))
    ids = torch.arange(7, 21).view(1, -1)
    rows, target = torch.arange(13), ids[0, 1:]
    with FlopCounterMode(display=False) as counter:
        logits = model.logits(ids)[0, rows]
        torch.nn.functional.cross_entropy(logits, target).backward()
    counted = counter.get_total_flops()
    flops = ModelFlops(model)
    # All 14 positions go through torch's head, and the gradient of the first block's input is not needed.
    expected = flops.of([14], 14)
    assert counted == pytest.approx(expected, rel=0.06)


def test_the_metrics_tell_them(tmp_path: Path) -> None:
    examples = tiny.examples(8)
    config = tiny.config("train.max_steps=1")
    train_pairs(config, tiny.model(), examples, tiny.halves(examples), folder=tmp_path)
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    lengths = [len(example.input_ids) for example in examples.values()]
    flops = ModelFlops(tiny.model()).of(lengths, record["num_tokens"])
    assert record["model_tflops"] == pytest.approx(flops / record["seconds"] / 1e12)
    assert "model_flops_utilisation" not in record or torch.cuda.is_available()
    assert record["mixed_share"] == 2 * record["num_mixed"] / record["num_tokens"]
    assert record["peak_memory_bytes"] > 0 and 0 <= record["data_seconds"] < record["seconds"]
