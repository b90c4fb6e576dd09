"""An adapter's files: peft loads them onto the plain base with the trained model's logits, and so do we, merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sftmix.config import LoraConfig, ModelConfig
from sftmix.model.adapter import check_adapter, merge_adapter, save_adapter
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.lora import apply_lora
from sftmix.model.merge import merged_state
from sftmix.model.probe import Surroundings
from sftmix.model.source import underlying
from tests.recipe import tiny
from tests.recipe.model import experts

EXPERTS = "all-linear,experts.down_proj,experts.gate_up_proj"


def trained(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[SFTMixModel, Any]:
    """A model with changed adapters, and its plain base."""
    plain = experts.causal_lm(kind, dtype=dtype)
    lora = LoraConfig(rank=3, **options)
    model = apply_lora(install_head(copy.deepcopy(plain)), lora, export="adapter")
    experts.randomise(model)
    return model, plain


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("llama", {"rslora": True, "target_modules": "q_proj,lm_head"}),
        ("llama", {"dora": True}),
        ("llama", {"modules_to_save": "embed_tokens,lm_head,norm"}),
        ("gpt2", {"dora": True}),
        ("gpt2", {"modules_to_save": "wte"}),
        ("mixtral", {"target_modules": EXPERTS}),
        ("mixtral", {"target_modules": "down_proj", "modules_to_save": "gate"}),
        ("gpt_oss", {"target_modules": EXPERTS, "rslora": True}),
        ("glm4_moe", {"target_modules": "q_proj,k_proj,v_proj,o_proj"}),
        pytest.param("llama4_text", {"target_modules": EXPERTS}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"target_modules": EXPERTS}, marks=pytest.mark.slow),
        pytest.param("olmoe", {"target_modules": EXPERTS}, marks=pytest.mark.slow),
        pytest.param("granitemoe", {"target_modules": EXPERTS}, marks=pytest.mark.slow),
        pytest.param("jamba", {}, marks=pytest.mark.slow),
    ],
)
def test_peft_loads_the_files_and_they_merge_into_the_same_weights(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, plain = trained(kind, **options)
    save_adapter(model, tmp_path, "org/base")
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert underlying(ModelConfig(name=str(tmp_path))).name == "org/base"
    expected, base = experts.logits(model.base), experts.logits(plain)
    assert (expected - base).abs().max() > 0.05
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    torch.testing.assert_close(experts.logits(loaded), expected, rtol=1e-5, atol=1e-5)
    merged, state = merge_adapter(copy.deepcopy(plain), tmp_path), merged_state(model)
    assert type(merged) is type(plain) and not hasattr(merged, "peft_config")
    assert merged.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in merged.state_dict().items())
    assert all(weight.requires_grad for weight in merged.parameters())
    if kind == "gpt2":
        assert merged.lm_head.weight is merged.transformer.wte.weight


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    model, plain = trained("llama", torch.bfloat16)
    save_adapter(model, tmp_path, "base")
    assert {weight.dtype for weight in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    state = merged_state(model)
    merged = merge_adapter(plain, tmp_path).state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in merged.items())
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("names", ["down_proj", "all-linear"])
def test_an_adapter_that_peft_loads_elsewhere_is_refused_before_training(kind: str, names: str) -> None:
    """peft takes the names of dense and shared layers for those of experts when it reads the file."""
    with pytest.raises(
        ValueError, match="export: expected merged, got an adapter that peft loads onto other weights"
    ):
        trained(kind, target_modules=names)


def test_checking_leaves_the_model_as_it_is() -> None:
    model, _ = trained("mixtral", target_modules=EXPERTS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    check_adapter(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_several_active_adapters_are_not_one_file(tmp_path: Path) -> None:
    config = PeftLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(experts.causal_lm("llama"), config, adapter_name="one")
    wrapped.add_adapter("two", copy.deepcopy(config))
    wrapped.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="export: expected one active adapter to write, got one, two"):
        save_adapter(SFTMixModel(wrapped, Surroundings("lm_head")), tmp_path, "base")


def test_a_folder_without_an_adapter_or_without_a_base(tmp_path: Path) -> None:
    config = ModelConfig(name=str(tmp_path))
    assert underlying(config) is config
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(
        ValueError, match=r"model.name: expected .*json to name base_model_name_or_path, got None"
    ):
        underlying(config)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, plain = trained("llama")
    save_adapter(model, tmp_path, "base")
    with pytest.raises(ValueError, match=r"expected the adapter in .* to fit its base: .*size mismatch"):
        merge_adapter(tiny.causal_lm("llama", hidden_size=32), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    save_file(
        {name: weight for name, weight in weights.items() if name != first}, file, metadata={"format": "pt"}
    )
    with pytest.raises(
        ValueError, match=r"expected its weights to fit LlamaForCausalLM, but .* has no value"
    ):
        merge_adapter(copy.deepcopy(plain), tmp_path)
    save_file(
        {**weights, "base_model.model.more.lora_A.weight": weights[first].clone()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"but .*more.lora_A.* has no place"):
        merge_adapter(copy.deepcopy(plain), tmp_path)


def test_an_adapter_that_tears_a_tie_is_refused(tmp_path: Path) -> None:
    config = PeftLoraConfig(
        r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(experts.causal_lm("gpt2"), config)
    experts.randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"to keep transformer.wte.weight and lm_head.weight equal"):
        merge_adapter(experts.causal_lm("gpt2"), tmp_path)


def test_another_method_of_peft_is_refused(tmp_path: Path) -> None:
    found = {"peft_type": "IA3", "base_model_name_or_path": "base", "target_modules": ["q_proj"],
             "feedforward_modules": []}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"model.name: expected a LoRA adapter in .*, got PeftType.IA3"):
        merge_adapter(experts.causal_lm("llama"), tmp_path)
