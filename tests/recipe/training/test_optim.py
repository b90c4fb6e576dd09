"""Float32 masters, weight decay, the learning-rate schedule and clipping."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from sftmix.config import OptimConfig
from sftmix.training.optim import (
    TrainableWeights,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from tests.recipe import tiny

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1)


def test_small_updates_survive_bfloat16() -> None:
    """100 updates of 1e-4 on a weight of 1: bfloat16 alone stays at 1, the master and its copy move."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    assert layer.weight - torch.tensor(1e-4, dtype=torch.bfloat16) == layer.weight
    weights = TrainableWeights(layer)
    optimizer = build_optimizer(weights, OptimConfig(lr=1e-4, weight_decay=0.0))
    for _ in range(100):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        weights.zero_grad()
        weights.copy_to_model()
    assert weights.masters["weight"].item() == pytest.approx(0.99, abs=1e-5)
    assert layer.weight.item() == pytest.approx(0.99, abs=2e-3)
    assert layer.weight.dtype == torch.bfloat16


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """1 + 2^-9 + 2^-9 is 1 when every partial sum is rounded to bfloat16."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    weights = TrainableWeights(layer)
    for value in (1.0, 2.0**-9, 2.0**-9):
        layer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    gradient = weights.masters["weight"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.item() == 1.0 + 2.0**-8


def test_a_float32_parameter_is_its_own_master() -> None:
    layer = nn.Linear(2, 2)
    weights = TrainableWeights(layer)
    assert weights.masters["weight"] is layer.weight
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected trainable parameters, found none"):
        TrainableWeights(layer)


def test_a_tied_weight_is_trained_once() -> None:
    model = tiny.model("qwen3", dtype=torch.bfloat16)
    weights = TrainableWeights(model)
    assert sum("embed_tokens" in name or "lm_head" in name for name in weights.masters) == 1


def test_matrices_decay_and_vectors_do_not() -> None:
    weights = TrainableWeights(tiny.model("phi"))
    optimizer = build_optimizer(weights, CONFIG)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, weight in weights.masters.items():
        assert (id(weight) in decayed) is not (name.endswith("bias") or "norm" in name), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights.masters)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_schedule_warms_up_and_falls() -> None:
    config = dataclasses.replace(CONFIG, warmup_ratio=0.1)
    rates = [learning_rate(config, step, 40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4] == pytest.approx(0.01)
    assert rates[22] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 18 / 36)))
    assert all(late < early for early, late in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-4
    linear = dataclasses.replace(config, schedule="linear")
    assert learning_rate(linear, 22, 40) == pytest.approx(0.005)
    constant = dataclasses.replace(config, schedule="constant", warmup_ratio=0.0)
    assert {learning_rate(constant, step, 40) for step in range(40)} == {0.01}
    assert learning_rate(config, 0, 1) == 0.01


def test_clipping_bounds_the_global_norm_and_reports_it() -> None:
    layer = nn.Linear(2, 1)
    weights = TrainableWeights(layer)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clip_gradients(weights, 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.8]))
    assert clip_gradients(weights, 10.0).item() == pytest.approx(1.0)
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.8]))


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(TrainableWeights(nn.Linear(2, 2)), CONFIG)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
