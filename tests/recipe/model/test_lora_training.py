"""What trains under LoRA: gradients of expert adapters, of the head's adapter and of whole modules, which blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from sftmix.config import LoraConfig
from sftmix.model.causal_lm import install_head
from sftmix.model.export import merge_and_export
from sftmix.model.lora import apply_lora, decoder_blocks
from sftmix.model.merge import merged_state
from sftmix_kernels import LossHead
from tests.recipe import tiny
from tests.recipe.model import experts
from tests.recipe.model.experts import randomise
from tests.recipe.model.test_causal_lm import batch


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gradients_of_expert_adapters_are_those_of_the_merged_weight(kind: str) -> None:
    """dB and dA follow from the gradient of W' = W + s B A, expert by expert."""
    model, data = (
        apply_lora(
            install_head(experts.causal_lm(kind)), LoraConfig(rank=2, target_modules="experts.down_proj")
        ),
        batch(),
    )
    randomise(model)
    model(**data).loss.backward()
    name = "model.layers.1.mlp.experts"
    layer = model.base.get_submodule(name)
    plain = experts.causal_lm(kind)
    plain.load_state_dict(merged_state(model))
    merged = install_head(plain)
    merged(**data).loss.backward()
    full = merged.base.get_submodule(name).down_proj.grad
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for expert in range(full.shape[0]):
        rows, columns = slice(2 * expert, 2 * expert + 2), slice(expert, None, full.shape[0])
        grad = full[expert].T if kind == "gpt_oss" else full[expert]
        scale = layer.scaling["default"]
        torch.testing.assert_close(up.grad[:, columns], scale * grad @ down[rows].T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(down.grad[rows], scale * up[:, columns].T @ grad, rtol=1e-4, atol=1e-6)


def test_a_head_trained_whole_gets_the_gradient_of_the_loss() -> None:
    model, data = (
        apply_lora(install_head(experts.causal_lm("llama")), LoraConfig(rank=2, modules_to_save="lm_head")),
        batch(),
    )
    model(**data).loss.backward()
    plain = experts.causal_lm("llama")
    logits = plain(data["input_ids"], attention_mask=data["attention_mask"]).logits.flatten(0, 1)[
        data["rows"]
    ]
    F.cross_entropy(logits, data["target"]).backward()
    torch.testing.assert_close(model.head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    assert model.base.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_lora_export_merges_and_leaves_the_trained_model_alone(kind: str, tmp_path: Path) -> None:
    model = apply_lora(tiny.model(kind), LoraConfig(rank=4, alpha=8))
    base_logits = model.base(batch()["input_ids"]).logits
    randomise(model)
    before = tiny.weights(model)
    merge_and_export(model, tiny.tokenizer(), tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(model).items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ids = batch()["input_ids"]
        logits, trained = plain(ids).logits, model.base(ids).logits
    assert (trained - base_logits).abs().max() > 0.05
    torch.testing.assert_close(logits, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "qwen3"])
def test_all_linear_leaves_the_head_and_the_base_frozen(kind: str) -> None:
    model = apply_lora(tiny.model(kind), LoraConfig(rank=2))
    assert type(model.head) is LossHead
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)
    blocks = {name.split("layers.")[-1].split("h.")[-1].split(".")[0] for name in trainable}
    assert blocks == {"0", "1"}


@pytest.mark.parametrize("target", ["lm_head", "q_proj,lm_head", "all-linear,lm_head"])
@pytest.mark.parametrize("kind", ["llama", "phi", "granite"])
def test_an_adapter_on_the_head_is_trained_by_the_loss(kind: str, target: str) -> None:
    """Loss, statistics and gradients of the adapter are those of cross entropy of peft's own logits."""
    model, data = apply_lora(tiny.model(kind), LoraConfig(rank=3, target_modules=target)), batch()
    randomise(model)
    before = tiny.model(kind)(**data).nll
    loss = model(**data)
    assert (loss.nll - before).abs().max() > 0.05
    head = {name: p for name, p in model.named_parameters() if "head.lora_" in name}
    assert len(head) == 2
    found = torch.autograd.grad(loss.loss, list(head.values()))
    logits = model.base(data["input_ids"], attention_mask=data["attention_mask"]).logits
    nll = F.cross_entropy(logits.flatten(0, 1)[data["rows"]], data["target"], reduction="none")
    expected = torch.autograd.grad(nll.mean(), list(head.values()))
    torch.testing.assert_close(loss.nll, nll.detach(), rtol=1e-4, atol=1e-5)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    stats = model(**data, stats=True)
    torch.testing.assert_close(stats.logprob, -loss.nll)


def test_an_adapter_on_the_head_is_merged_on_export(tmp_path: Path) -> None:
    model = apply_lora(tiny.model("phi"), LoraConfig(rank=3, target_modules="all-linear,lm_head"))
    randomise(model)
    merge_and_export(model, tiny.tokenizer(), tmp_path)
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path), batch()["input_ids"]
    assert type(plain.get_output_embeddings()) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.base(ids).logits, rtol=1e-4, atol=1e-4)


def test_lower_blocks_record_no_graph_when_only_upper_ones_are_adapted() -> None:
    model = apply_lora(tiny.model("llama"), LoraConfig(rank=2, layers="1:2")).train()
    assert all(".layers.1." in name for name, p in model.named_parameters() if p.requires_grad)
    outputs: list[bool] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    for block in decoder_blocks(model)[1]:
        block.register_forward_hook(record)
    model(**batch()).loss.backward()
    assert outputs == [False, True]
