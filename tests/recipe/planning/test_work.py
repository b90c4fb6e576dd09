"""Flops against those that torch counts in a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sftmix.planning.work import active_share, forward_flops, step_flops
from tests.recipe import tiny
from tests.recipe.planning.measured import Case, built, modelled

LLAMA = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
CASES = [Case("llama", LLAMA), Case("gpt2", {}), Case("llama", LLAMA, flags=("train.tuning=lora",))]


def counted(case: Case, sequences: int, length: int) -> tuple[dict[str, int], dict[str, int]]:
    """Flops of the decoder's forward, and of forward and backward: products, and attention's."""
    model = built(case)
    model.base.set_attn_implementation("eager")  # whose products torch counts on a CPU
    model.train()
    ids = torch.zeros(sequences, length, dtype=torch.int64)
    decoder: Any = model.base.base_model if case.kind == "gpt2" else model.decoder
    with FlopCounterMode(display=False) as counter:
        hidden = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        forward = _of(counter)
        hidden.sum().backward()
    return forward, _of(counter)


def _of(counter: FlopCounterMode) -> dict[str, int]:
    found = {str(op).removeprefix("aten."): int(n) for op, n in counter.get_flop_counts()["Global"].items()}
    return {"attention": found.get("bmm", 0), "products": found.get("mm", 0) + found.get("addmm", 0)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_are_those_that_torch_counts(case: Case) -> None:
    sequences, length = 2, 32
    _, model, _ = modelled(case)
    forward, both = counted(case, sequences, length)
    found = forward_flops(model, sequences=sequences, length=length, rows=0)
    assert (found.products, found.attention) == (forward["products"], forward["attention"])
    step = step_flops(model, sequences=sequences, length=length, rows=0, head_units=3, recomputes=False)
    if not model.is_lora:
        assert step.products == both["products"]
    else:  # the first layers of the first block need no gradient of their inputs
        assert both["products"] <= step.products <= 1.2 * both["products"]
    # Eager attention keeps its probabilities; the kernels make them again in the backward, half a forward more.
    assert step.attention == both["attention"] + forward["attention"] // 2


def test_the_head_is_paid_by_row_and_by_schedule() -> None:
    _, model, _ = modelled(Case("llama", LLAMA))
    told = {"sequences": 2, "length": 32, "rows": 40}
    unit = 2 * 40 * 512 * 64
    assert forward_flops(model, **told).head == unit
    for units in (3, 4):
        step = step_flops(model, **told, head_units=units, recomputes=True)
        forward = forward_flops(model, **told)
        assert step.head == units * unit
        assert step.recomputing == forward.products + forward.attention


def test_tokens_pass_their_experts_alone() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral", **tiny.ARCHITECTURES["mixtral"])
    assert active_share(3, config) == 0.5
    assert active_share(2, config) == active_share(3, None) == 1.0
