"""Adapters of peft that are not LoRA, or not adapted: a call for the loss is refused by the adapter's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sftmix_kernels import LossHead, SFTMixLoss, adapt_head, sftmix_loss
from tests.kernels.adapted_models import (
    D,
    R,
    Tiny,
    V,
    adapted,
    assert_same_loss,
    case_of_pairs,
    merged_loss,
    peft,
    through_torch,
)  # fmt: skip

# Adapters of peft that have no layer around a linear one, or refuse a LossHead themselves when the model is made.
WITHOUT_A_LAYER = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "GLORA", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING",
    "PROMPT_TUNING", "SHADOW", "XLORA",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 32},
    "WAVEFT": {"n_frequency": 10},
}
KINDS = {kind.value: config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - WITHOUT_A_LAYER - {"LORA"}))
def test_every_other_adapter_refuses_a_target_by_its_name(kind: str) -> None:
    """Before and after adapt_head refused it; its logits stay, and merged or taken off the head is whole again."""
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    case = case_of_pairs()
    inner = Tiny()
    model = peft.get_peft_model(inner, KINDS[kind](target_modules=["lm_head"], **SETTINGS.get(kind, {})))
    layer = model.base_model.model.lm_head
    name = rf"{kind.lower()}\.{type(layer).__name__}"
    with pytest.raises(ValueError, match=f"layer: expected a peft LoRA layer around a LossHead, got {name}"):
        adapt_head(layer)
    for arguments in ((case.target,), (case.target, case.lam)):
        with pytest.raises(ValueError, match=f"target: expected None for peft's {name}.*merge_and_unload"):
            model(case.hidden, *arguments)
    with pytest.raises(ValueError, match=f"target: expected None for peft's {name}"):
        model(case.hidden, target=case.target, stats=True)
    if kind != "POLY":  # whose logits need ids of tasks
        assert model(case.hidden).shape == (12, V)
        assert layer(case.hidden, None).shape == (12, V)


@pytest.mark.parametrize("feedforward", [[], ["lm_head"]], ids=["output", "input"])
def test_merged_an_adapter_of_any_kind_is_the_head_again(feedforward: list[str]) -> None:
    model = peft.get_peft_model(
        Tiny(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=feedforward)
    )
    layer, body = model.base_model.model.lm_head, model.base_model.model.body
    with torch.no_grad():
        layer.ia3_l["default"].uniform_(0.5, 1.5)
        factor = layer.ia3_l["default"].clone()
        weight, bias = layer.base_layer.weight * factor, layer.base_layer.bias
        bias = bias if feedforward else bias * factor.flatten()
    case = case_of_pairs()
    plain = model.merge_and_unload()
    expected = sftmix_loss(
        body(case.hidden), weight, case.target, case.lam, bias=bias, softcap=4.0, logit_scale=0.7, impl="reference"
    )  # fmt: skip
    assert_same_loss(plain(case.hidden, case.target, case.lam), expected)


def test_a_lora_layer_that_was_not_adapted_says_what_to_call() -> None:
    model, layer = adapted()
    case = case_of_pairs()
    for forgotten in (model, copy.deepcopy(model), through_torch(model)):
        with pytest.raises(
            ValueError, match=r"target: expected None for peft's lora.Linear.*call .*adapt_head"
        ):
            forgotten(case.hidden, case.target)
    adapt_head(layer)
    assert_same_loss(model(case.hidden, case.target, case.lam), merged_loss(model, case))


def test_trained_tokens_of_the_head_refuse_a_target() -> None:
    """peft leaves the target out of the call, and gave logits as if none had been asked for."""
    config = peft.LoraConfig(r=R, target_modules=["body"], trainable_token_indices={"lm_head": [1, 2]})
    model = peft.get_peft_model(Tiny(), config)
    case = case_of_pairs()
    with pytest.raises(ValueError, match="target: expected None for peft's TrainableTokensWrapper"):
        model(case.hidden, case.target, case.lam)
    assert model(case.hidden).shape == (12, V)


def test_an_adapter_in_an_adapter_refuses_a_target() -> None:
    """In peft's mixed models one layer holds the other, and the outer one may never call the inner."""
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=R, target_modules=["lm_head"]), mixed=True)
    model.add_adapter("outer", peft.LoHaConfig(r=R, target_modules=["lm_head"]))
    layer = model.base_model.model.lm_head
    case = case_of_pairs()
    assert isinstance(layer.base_layer.base_layer, LossHead)
    with pytest.raises(ValueError, match=r"target: expected None for peft's loha.Linear"):
        layer(case.hidden, case.target)


def test_a_layer_with_a_forward_of_its_own_is_not_adapted() -> None:
    """X-LoRA's gates and accelerate's hooks replace it, and would be passed by or pass us by."""
    _, layer = adapted()
    own = layer.forward
    layer.forward = lambda *args, **options: own(*args, **options)
    with pytest.raises(ValueError, match=r"layer: expected the forward of lora.Linear, got one put on it"):
        adapt_head(layer)
    case = case_of_pairs()
    with pytest.raises(ValueError, match=r"target: expected None for peft's lora\.Linear"):
        layer(case.hidden, case.target)


def test_layers_that_hold_no_head_are_left_alone() -> None:
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=R, target_modules=["body"]))
    assert not model.base_model.model.body._forward_pre_hooks
    case = case_of_pairs()
    assert isinstance(model(case.hidden, case.target, case.lam), SFTMixLoss)


def test_a_module_of_your_own_around_the_head_is_left_alone() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = LossHead(D, V)

        def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> SFTMixLoss:
            return self.base_layer(hidden, target)

    case, own = case_of_pairs(), Own()
    assert not own._forward_pre_hooks
    expected = torch.nn.functional.cross_entropy(case.hidden @ own.base_layer.weight.T, case.target)
    torch.testing.assert_close(own(case.hidden, case.target).loss, expected)
