"""LoRA on the recipe's model: what is adapted, what is refused and why, first values, the head, what share trains."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sftmix.config import LoraConfig
from sftmix.model import lora as lora_module
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.lora import apply_lora, find_targets, trained_share
from sftmix.model.merge import merge_plan
from tests.recipe import tiny
from tests.recipe.model import experts
from tests.recipe.model.experts import randomise

EXPERTS = "all-linear,experts.down_proj,experts.gate_up_proj"


def built(kind: str, dtype: torch.dtype = torch.float32) -> SFTMixModel:
    return install_head(experts.causal_lm(kind, dtype=dtype))


def adapted(kind: str, **options: Any) -> set[str]:
    """Names of the adapted weights, layer numbers and prefixes left out."""
    model = apply_lora(built(kind), LoraConfig(rank=2, **options))
    return {
        re.sub(r"^(model|transformer)\.(layers|h)\.\d+\.", "", name) for name in merge_plan(model.base).layers
    }


ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}


def test_names_match_linear_layers_and_expert_weights() -> None:
    assert adapted("mixtral") == ATTENTION
    assert adapted("mixtral", target_modules="down_proj") == {"mlp.experts.down_proj"}
    assert adapted("mixtral", target_modules="q_proj, gate_up_proj") == {
        "self_attn.q_proj.weight",
        "mlp.experts.gate_up_proj",
    }
    assert adapted("mixtral", target_modules=EXPERTS) == ATTENTION | {
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
    }
    assert adapted("glm4_moe", target_modules="down_proj") == {
        "mlp.down_proj.weight",
        "mlp.shared_experts.down_proj.weight",
        "mlp.experts.down_proj",
    }
    assert adapted("glm4_moe", target_modules="shared_experts.down_proj") == {
        "mlp.shared_experts.down_proj.weight"
    }
    assert adapted("glm4_moe", target_modules="gate_proj") == {
        "mlp.gate_proj.weight",
        "mlp.shared_experts.gate_proj.weight",
    }
    assert adapted("llama", target_modules="all-linear,q_proj") == adapted("llama")
    assert adapted("llama", target_modules="lm_head,up_proj") == {"lm_head.weight", "mlp.up_proj.weight"}


BLOCKS = "linear layers or expert weights of the decoder's blocks"
REFUSED = [
    ("llama", "q_proj,nope", r"all-linear or some of .*q_proj.*, got nope"),
    ("llama", "all-linear,nope", r"all-linear or some of .*, got nope"),
    ("mixtral", "w1", r"all-linear or some of down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj, got w1"),
    ("llama", "embed_tokens", r"BLOCKS, got embed_tokens, an embedding .*; lora.modules_to_save=embed_"),
    ("llama", "norm", r"BLOCKS, got norm, a LlamaRMSNorm, which is not a linear layer alone \(model.norm\)"),
    ("mixtral", "gate", r"BLOCKS, got gate, a MixtralTopKRouter, .*lora.modules_to_save=gate trains it whole"),
    ("llama4_text", "router", r"BLOCKS, got router, a Llama4Router, which is not a linear layer alone"),
    ("gpt_oss", "down_proj_bias", r"BLOCKS, got down_proj_bias, a parameter of shape \[4, 16\]"),
    ("jamba", "dt_proj", r"BLOCKS, got dt_proj, whose weight the model reads past the layer \(model.layers.0"),
    ("gpt2", "lm_head", r"modules with .* own, got lm_head, the head, which GPT2LMHeadModel ties to"),
]  # fmt: skip


@pytest.mark.parametrize("kind, names, message", REFUSED)
def test_a_name_that_cannot_be_adapted_is_refused_with_the_reason(
    kind: str, names: str, message: str
) -> None:
    model = built(kind)
    before = set(model.state_dict())
    with pytest.raises(
        ValueError, match="lora.target_modules: expected " + message.replace("BLOCKS", BLOCKS)
    ):
        apply_lora(model, LoraConfig(target_modules=names))
    assert set(model.state_dict()) == before  # nothing was put in


def test_a_linear_layer_outside_the_blocks_is_refused() -> None:
    model = install_head(tiny.causal_lm("opt"))
    with pytest.raises(
        ValueError, match=r"got project_in, a linear layer outside the blocks \(model.decoder.proj"
    ):
        find_targets(model, LoraConfig(target_modules="project_in"))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("llama", {"layers": "1:3"}, r"lora.layers: expected start:stop with 0 <= start < stop <= 2, got '1:3'"),
        ("glm4_moe", {"target_modules": "mlp.down_proj", "layers": "1:2"}, "lora.layers=1:2 leaves out"),
        ("mixtral", {"target_modules": "down_proj", "dropout": 0.1},
         "lora.dropout: expected 0 with the fused experts' down_proj as targets, got 0.1; name linear layers alone"),
        ("mixtral", {"target_modules": EXPERTS, "dora": True},
         "lora.dora: expected false with the fused experts' down_proj, gate_up_proj as targets, got true"),
        ("llama", {"target_modules": "q_proj,lm_head", "dropout": 0.1}, r"lora.dropout: expected 0 with lm_head"),
        ("llama", {"target_modules": "lm_head", "dora": True}, r"lora.dora: expected false with lm_head \(the head"),
        ("llama", {"modules_to_save": "nope"}, "lora.modules_to_save: expected names of modules .* got 'nope'"),
        ("llama", {"modules_to_save": "rotary_emb"}, "lora.modules_to_save: .* got 'rotary_emb', which matches none"),
        ("llama", {"modules_to_save": "layers"}, "got model.layers, a list of modules"),
        ("llama", {"modules_to_save": "q_proj"}, "modules without an adapter, got .*q_proj, whose weight "),
        ("llama", {"modules_to_save": "mlp"}, r"got model.layers.0.mlp, whose down_proj.weight lora.target_modules"),
        ("mixtral", {"target_modules": "down_proj", "modules_to_save": "experts"}, "experts, whose down_proj "),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_lora(built(kind), LoraConfig(**options))


def test_what_peft_made_is_compared_with_what_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft left alone turns ``down_proj`` of a dense layer into a parameter of the experts and drops the layer."""
    monkeypatch.setattr(lora_module, "_names_as_given", lambda: torch.no_grad())
    with pytest.raises(
        ValueError,
        match=r"expected peft to adapt 3 weights, got no adapter on model.layers.0.mlp.down_proj.weight",
    ):
        apply_lora(built("glm4_moe"), LoraConfig(target_modules="down_proj"))


def _stop(holds: bool) -> None:
    assert holds
    raise RuntimeError("stop")


def test_pefts_renaming_is_back_after_an_error() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    before = conversion.convert_peft_config_for_transformers
    with pytest.raises(RuntimeError, match="stop"), lora_module._names_as_given():
        _stop(conversion.convert_peft_config_for_transformers is not before)
    assert conversion.convert_peft_config_for_transformers is before


def test_the_trained_share_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama: q 256, k 128, v 128, o 256, three of 384 in a block, norms 32; embedding and head 976, norm 16."""
    share = trained_share(apply_lora(built("llama"), LoraConfig(rank=2)))
    assert (share.trainable, share.total) == (2 * 2 * 232, 2 * 2 * 232 + 2 * 1952 + 2 * 976 + 16)
    assert (share.adapted, share.blocks, share.whole) == (2 * 1920, 2 * 1952, ())
    assert capsys.readouterr().out == (
        "lora: 928 parameters train, 13.6 % of 6,800; adapters on 3,840 of the blocks' 3,904 parameters\n"
    )


def test_the_share_of_a_mixture_says_what_all_linear_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Mixtral: attention 768, router 32, two experts of 3 * 384, norms 32 in each of two blocks."""
    share = trained_share(apply_lora(built("mixtral"), LoraConfig(rank=2)))
    assert (share.adapted, share.blocks) == (2 * 768, 2 * (768 + 32 + 2 * 1152 + 32))
    assert capsys.readouterr().out.endswith(f"lora.target_modules={EXPERTS} adapts them\n")
    share = trained_share(apply_lora(built("mixtral"), LoraConfig(rank=2, target_modules=EXPERTS)))
    attention, gate_up, down = 2 * 112, 2 * 2 * (16 + 48), 2 * 2 * (24 + 16)
    assert share.trainable == 2 * (attention + gate_up + down)
    assert share.adapted == 2 * (768 + 2 * 1152)
    assert "leaves out" not in capsys.readouterr().out
    apply_lora(built("jamba"), LoraConfig(rank=2))
    assert (
        "all-linear leaves out dt_proj, out_proj, x_proj, whose weight the model reads past the layer"
        in capsys.readouterr().out
    )


def test_whole_modules_count_once_and_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = apply_lora(
        built("gpt2"), LoraConfig(rank=1, target_modules="c_attn", modules_to_save="wte,lm_head")
    )
    share = trained_share(model)
    assert share.trainable == 61 * 16 + 2 * (16 + 48) and share.whole == ("transformer.wte.weight",)
    assert model.is_tied and "; trained whole: transformer.wte.weight\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind, options", [("llama", {}), ("llama", {"dora": True}), ("gpt2", {"dora": True}),
                                           ("gpt_oss", {"target_modules": EXPERTS})])  # fmt: skip
def test_adapters_are_float32_seeded_and_independent_of_the_global_generator(
    kind: str, options: dict[str, Any]
) -> None:
    first, second, other = (built(kind, torch.bfloat16) for _ in range(3))
    lora = LoraConfig(rank=2, **options)
    apply_lora(first, lora, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    apply_lora(second, lora, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    apply_lora(other, lora, seed=4)
    one, two, three = (
        {name: p for name, p in model.named_parameters() if p.requires_grad}
        for model in (first, second, other)
    )
    assert {p.dtype for p in one.values()} == {torch.float32}
    assert {p.dtype for p in first.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(torch.equal(one[name], two[name]) for name in one)
    drawn = {name for name in one if not torch.equal(one[name], three[name])}
    assert drawn == {name for name in one if ".lora_A." in name}
    assert all(bool((one[name] == 0).all()) for name in one if ".lora_B." in name)
    torch.testing.assert_close(
        experts.logits(first.base),
        experts.logits(experts.causal_lm(kind, dtype=torch.bfloat16)),
        rtol=0,
        atol=0.02,
    )


def test_dropout_is_off_in_a_model_in_eval_mode() -> None:
    model = apply_lora(built("llama"), LoraConfig(rank=2, dropout=0.5))
    randomise(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(experts.logits(model.base), experts.logits(model.base))


def test_an_adapter_on_the_head_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    share = trained_share(apply_lora(built("llama"), LoraConfig(rank=2, target_modules="lm_head")))
    assert share.head and (share.trainable, share.adapted) == (2 * (61 + 16), 0)
    assert "adapters on 0 of the blocks' 3,904 parameters and on the head\n" in capsys.readouterr().out
