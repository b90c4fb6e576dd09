"""Where a training step's time goes: torch's profiler by kind of operator, and the host's share."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.loop_ways import DEVICE, Ground

# Kinds by the beginning of an operator's name, the first that fits; times are of the operator itself.
KINDS = (
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn", "mkldnn")),
    ("attention", ("aten::_scaled_dot_product", "aten::scaled_dot_product")),
    ("softmax and cross-entropy", ("aten::_log_softmax", "aten::nll_loss", "aten::_softmax", "aten::logsumexp")),
    ("optimizer", ("aten::_fused_adam", "aten::_foreach", "aten::addcmul_", "aten::addcdiv_", "aten::lerp_")),
    ("copies and conversions", ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::cat")),
    ("filling and indexing", ("aten::fill_", "aten::zero_", "aten::index", "aten::gather", "aten::scatter")),
    ("embedding", ("aten::embedding",)),
)  # fmt: skip


def kind_of(operator: str) -> str:
    """The kind of a torch operator, ``elementwise and others`` where none is named."""
    for kind, names in KINDS:
        if operator.startswith(names):
            return kind
    return "elementwise and others"


def by_kind(way: Any, *, skip: int, steps: int) -> dict[str, float]:
    """Milliseconds a step of each kind of operator, by torch's profiler, largest first; ``skip`` steps before."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    ends: list[float] = []

    def end_of_step() -> None:  # in the thread that trains: the profiler sees the thread that starts it
        ends.append(time.perf_counter())
        if len(ends) == skip:
            profile.start()
            ends[-1] = time.perf_counter()
        elif len(ends) == skip + steps:
            profile.stop()

    way(end_of_step, skip + steps + 1)
    found: dict[str, float] = {}
    for event in profile.key_averages():
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total / 1000 / steps
    wall = 1000 * (ends[skip + steps - 1] - ends[skip - 1]) / steps
    told = dict(sorted(found.items(), key=lambda item: -item[1]))
    return {"step": wall, **told}


def small_model(ground: Ground, folder: Path) -> Any:
    """Two narrow layers with the vocabulary of the ground's model: what its steps cost is mostly the host's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sftmix.config import override
    from sftmix.model.load import load_model

    config = AutoConfig.from_pretrained(ground.source.name)
    config.hidden_size = config.intermediate_size = 64
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 2, 2, 1
    config.head_dim = 32
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ground.session.tokenizer.save_pretrained(folder)
    source = override(ground.config, [f"model.name={folder}", "model.gguf_file=null"]).model
    return load_model(source, device=DEVICE, tuning="full")[0]


def host_work(ground: Ground, *, passes: int = 5) -> dict[str, float]:
    """Milliseconds a step that our loop's own work takes on the host, clocks around the calls that are not its own.

    Of the real steps with online dynamics, on a small model: all of an epoch but what a bare loop does too (the model's
    forward and backward, clipping, the optimizer and its copies) and checkpoints. ``batches``: the part that makes
    batches. The median of ``passes`` over the steps, after one that warms up.
    """
    from sftmix.config import override
    from sftmix.training import trainer
    from sftmix.training.optim import TrainableWeights
    from sftmix.training.runs import train_pairs

    calls: list[tuple[Any, str]] = [
        (trainer.Trainer, "_loss"), (torch.Tensor, "backward"), (trainer, "clip_gradients"),
        (torch.optim.AdamW, "step"),
        (TrainableWeights, "copy_to_model"), (TrainableWeights, "zero_grad"), (trainer.Trainer, "_save"),
    ]  # fmt: skip
    config = override(ground.config, ["train.method=sftmix"])
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = small_model(ground, Path(temporary) / "model")
        for number in range(passes + 1):
            with (
                clocks(calls) as outside,
                clocks([(trainer.Trainer, "_run_epoch")]) as whole,
                clocks([(trainer, "collate_chunk")]) as batches,
            ):
                train_pairs(
                    config, model, ground.examples, ground.halves, folder=Path(temporary) / str(number)
                )
            assert all(outside.values()), outside
            host = sum(whole.values()) - sum(outside.values())
            steps = len(ground.steps)
            found.append({"host": 1000 * host / steps, "batches": 1000 * sum(batches.values()) / steps})
    return {key: statistics.median(one[key] for one in found[1:]) for key in found[0]}


@contextmanager
def clocks(calls: Sequence[tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Seconds in each of these functions, each an owner and a name, for the length of the block."""
    seconds = {name: 0.0 for _, name in calls}
    before = [(owner, name, getattr(owner, name)) for owner, name in calls]

    def timed(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - began

        return call

    try:
        for owner, name, function in before:
            setattr(owner, name, timed(name, function))
        yield seconds
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
