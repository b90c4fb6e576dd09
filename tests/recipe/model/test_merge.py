"""The merged weights are the trained model's, for every kind of adapter and of layer under it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from sftmix.config import LoraConfig
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.lora import apply_lora
from sftmix.model.merge import merge_plan, merged_state, merged_weights
from sftmix.model.probe import Surroundings
from tests.recipe.model import experts

EXPERTS = "all-linear,experts.down_proj,experts.gate_up_proj"
QUICK = ["mixtral", "glm4_moe", "gpt_oss", "llama4_text"]
SLOW = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in experts.CONFIGS
    if kind not in (*QUICK, "llama", "gpt2")
]


def assert_merged(kind: str, **options: Any) -> SFTMixModel:
    """Train-like changes, merged into a plain copy: its logits are the trained model's and not the base's."""
    plain = experts.causal_lm(kind)
    model = apply_lora(install_head(copy.deepcopy(plain)), LoraConfig(rank=3, **options))
    base = experts.logits(plain)
    torch.testing.assert_close(experts.logits(model.base), base, rtol=1e-4, atol=1e-5)  # begins as the base
    experts.randomise(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = experts.logits(model.base)
    assert (trained - base).abs().max() > 0.05
    state = merged_state(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(experts.logits(plain), trained, rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", *QUICK, *SLOW])
def test_all_linear_is_merged(kind: str) -> None:
    assert_merged(kind)


@pytest.mark.parametrize("kind", ["llama", *QUICK, *SLOW])
def test_down_proj_is_merged_wherever_it_stands(kind: str) -> None:
    """Linear layers and experts of that name, as a run with ``--lora.target_modules down_proj`` adapts them."""
    model = assert_merged(kind, target_modules="down_proj")
    names = {name for name in model.base.state_dict() if "down_proj" in name and "lora_" not in name}
    names = {name.replace(".base_layer", "") for name in names if "bias" not in name}
    assert set(merge_plan(model.base).layers) == names


@pytest.mark.parametrize("kind", [*QUICK, *SLOW])
def test_nested_adapters_of_experts_are_merged(kind: str) -> None:
    model = assert_merged(kind, target_modules=EXPERTS, rslora=True)
    made = merge_plan(model.base).layers
    assert {name.rpartition(".")[2] for name in made} >= {"down_proj", "gate_up_proj", "weight"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "glm4_moe"])
def test_dora_is_merged(kind: str) -> None:
    model = assert_merged(kind, dora=True)
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    plain = experts.causal_lm("llama")
    model = apply_lora(install_head(copy.deepcopy(plain)), LoraConfig(rank=4, alpha=6, rslora=True))
    experts.randomise(model)
    name = "model.layers.0.mlp.up_proj"
    parts = dict(model.base.named_parameters())
    up, down = parts[f"{name}.lora_B.default.weight"], parts[f"{name}.lora_A.default.weight"]
    expected = plain.get_submodule(name).weight + 3.0 * (up @ down)
    torch.testing.assert_close(merged_state(model)[f"{name}.weight"], expected.detach())


def test_dora_keeps_the_direction_and_sets_the_norm_of_rows() -> None:
    model = apply_lora(install_head(experts.causal_lm("llama")), LoraConfig(rank=2, dora=True))
    name = "model.layers.1.self_attn.q_proj"
    magnitude = dict(model.base.named_parameters())[f"{name}.lora_magnitude_vector.default.weight"]
    weight = model.base.get_submodule(name).base_layer.weight
    torch.testing.assert_close(magnitude, weight.norm(dim=1))
    with torch.no_grad():
        magnitude.mul_(3)
    torch.testing.assert_close(merged_state(model)[f"{name}.weight"], 3 * weight)


@pytest.mark.parametrize(
    "kind, names",
    [("llama", "embed_tokens,lm_head,norm"), ("gpt2", "wte"), ("mixtral", "gate,input_layernorm")],
)
def test_modules_trained_whole_are_exported(kind: str, names: str) -> None:
    model = assert_merged(kind, modules_to_save=names)
    state = merged_state(model)
    if kind == "gpt2":
        assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


def test_a_merge_in_bfloat16_rounds_once_and_says_what_it_lost(capsys: pytest.CaptureFixture[str]) -> None:
    base = experts.causal_lm("llama", dtype=torch.bfloat16)
    model = apply_lora(install_head(copy.deepcopy(base)), LoraConfig(rank=2, target_modules="q_proj"))
    name = "model.layers.0.self_attn.q_proj"
    parts = dict(model.base.named_parameters())
    up, down = parts[f"{name}.lora_B.default.weight"], parts[f"{name}.lora_A.default.weight"]
    weight = base.get_submodule(name).weight.detach()
    for size, lost in ((1e-6, 1.0), (1e-3, 0.2), (1.0, 0.0)):
        with torch.no_grad():
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(0)) * size)
        capsys.readouterr()
        state = merged_state(model)
        exact = weight.float() + 16 * (up @ down).detach()
        assert state[f"{name}.weight"].dtype == torch.bfloat16
        assert torch.equal(state[f"{name}.weight"], exact.bfloat16())
        error = (exact.bfloat16().float() - exact).norm() / (exact - weight.float()).norm()
        _, rounding = merged_weights(model.base, model.dtypes, model.dtype)
        assert rounding.share == pytest.approx(float(error), rel=1e-3)
        said = f"export: {100 * float(error):.0f} % of the adapters' change is lost in rounding to bfloat16"
        assert (said in capsys.readouterr().out) == (float(error) > 0.03)
        assert abs(rounding.share - lost) < 0.2


def several(**second: Any) -> SFTMixModel:
    """A peft model of a caller's with two adapters, both active."""
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(experts.causal_lm("llama"), PeftLoraConfig(**options), adapter_name="one")
    wrapped.add_adapter("two", PeftLoraConfig(**{**options, "r": 3, "target_modules": ["q_proj"], **second}))
    wrapped.base_model.set_adapter(["one", "two"])
    model = SFTMixModel(wrapped, Surroundings("lm_head"))
    experts.randomise(model)
    return model


def test_all_active_adapters_are_merged() -> None:
    model, plain = several(), experts.causal_lm("llama")
    base, trained = experts.logits(plain), experts.logits(model.base)
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(experts.logits(plain), trained, rtol=1e-4, atol=1e-4)
    model.model.base_model.set_adapter("two")
    plain.load_state_dict(merged_state(model))
    one = experts.logits(plain)
    torch.testing.assert_close(one, experts.logits(model.base), rtol=1e-4, atol=1e-4)
    assert (one - trained).abs().max() > 0.05 < (one - base).abs().max()


def test_pefts_own_modules_to_save_are_merged() -> None:
    config = PeftLoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    wrapped, plain = get_peft_model(experts.causal_lm("llama"), config), experts.causal_lm("llama")
    experts.randomise(wrapped)
    state, _ = merged_weights(wrapped.get_base_model(), {}, torch.float32)
    plain.load_state_dict(state)
    torch.testing.assert_close(experts.logits(plain), experts.logits(wrapped), rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_merged_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"expected one active adapter with DoRA, got several on model.layers.0"
    ):
        merged_state(several(use_dora=True))
    with pytest.raises(ValueError, match="expected adapters without a bias, got lora_bias=True"):
        merged_state(several(lora_bias=True))
    with pytest.raises(
        ValueError, match=r"every trained parameter to reach .* 2 would not, e.g. .*embed_tokens"
    ):
        merged_state(several(target_modules=["embed_tokens"]))
    merged = several()
    merged.model.merge_adapter()
    with pytest.raises(ValueError, match=r"got merged ones; unmerge_adapter\(\) first"):
        merged_state(merged)


def test_a_trained_parameter_that_the_merge_would_miss_is_refused() -> None:
    model = apply_lora(install_head(experts.causal_lm("llama")), LoraConfig(rank=2))
    layer = model.base.get_submodule("model.layers.0.mlp.up_proj")
    layer.lora_extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"but 1 would not, e.g. model.layers.0.mlp.up_proj.lora_extra"):
        merged_state(model)
