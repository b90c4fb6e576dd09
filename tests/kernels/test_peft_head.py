"""A peft LoRA layer around a LossHead: once adapted it computes the loss, and stays peft's in all else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import LossHead, adapt_head, sftmix_loss, token_stats
from sftmix_kernels.around_head import adapted_class, lora_of
from tests.kernels.adapted_models import (
    D,
    R,
    Tiny,
    adapted,
    assert_same_loss,
    case_of_pairs,
    merged_loss,
    peft,
    through_torch,
)  # fmt: skip


def leaf(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def test_a_peft_layer_around_the_head_computes_the_loss_with_its_adapter() -> None:
    model, layer = adapted()
    case = case_of_pairs()
    assert adapt_head(layer) is layer and adapt_head(layer) is layer
    assert adapt_head(layer.base_layer) is layer.base_layer
    out = model(case.hidden, case.target, case.lam)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 2

    plain = copy.deepcopy(model).merge_and_unload()
    head = plain.lm_head
    assert type(head) is LossHead
    expected = plain(case.hidden, case.target, case.lam)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-5, atol=1e-5, msg=name)
    down, up = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    leaves = leaf(down, up)
    weight = layer.base_layer.weight.detach() + 2.0 * leaves[1] @ leaves[0]
    with torch.no_grad():
        hidden = model.base_model.model.body(case.hidden)
    loss = sftmix_loss(
        hidden, weight, case.target, case.lam, bias=head.bias.detach(), softcap=4.0, logit_scale=0.7,
        impl="reference",
    ).loss  # fmt: skip
    for gradient, other in zip((down.grad, up.grad), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    stats = model(case.hidden, case.target, stats=True)
    expected_stats = token_stats(
        hidden, weight.detach(), case.target, bias=head.bias, softcap=4.0, logit_scale=0.7
    )
    torch.testing.assert_close(stats.entropy, expected_stats.entropy, rtol=1e-4, atol=1e-4)


def test_logits_names_and_saving_stay_pefts() -> None:
    model, layer = adapted()
    before, hidden = list(model.state_dict()), torch.randn(2, 3, D)
    logits = model(hidden)
    adapt_head(layer)
    assert list(model.state_dict()) == before
    assert torch.equal(model(hidden), logits)
    assert layer.softcap == 4.0 and layer.logit_scale == 0.7


def test_an_adapter_that_is_off_or_merged_is_not_added_twice() -> None:
    model, layer = adapted()
    adapt_head(layer)
    case = case_of_pairs()
    on = model(case.hidden, case.target, case.lam).loss
    with model.disable_adapter():
        assert lora_of(layer) is None
        off = model(case.hidden, case.target, case.lam).loss
    own = layer.base_layer(model.base_model.model.body(case.hidden), case.target, case.lam).loss
    assert torch.equal(off, own) and not torch.isclose(on, off)
    model.merge_adapter()
    assert lora_of(layer) is None
    torch.testing.assert_close(model(case.hidden, case.target, case.lam).loss, on)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "expected plain LoRA, got DoRA"),
        ({"lora_bias": True}, "expected LoRA factors without a bias"),
        ({"lora_dropout": 0.1}, r"expected LoRA without dropout \(or eval mode\), got lora_dropout=0.1"),
    ],
)
def test_what_two_factors_do_not_say_is_refused(changes: dict[str, Any], message: str) -> None:
    model, layer = adapted(**changes)
    adapt_head(layer)
    case = case_of_pairs()
    with pytest.raises(ValueError, match=message):
        model.train()(case.hidden, case.target)
    if "lora_dropout" in changes:
        model.eval()(case.hidden, case.target)


def test_several_active_adapters_are_refused_and_one_of_them_is_not() -> None:
    model, layer = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    adapt_head(layer)
    case = case_of_pairs()
    layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="expected one active LoRA adapter, got default, other"):
        model(case.hidden, case.target)
    layer.set_adapter("other")
    model(case.hidden, case.target)


def test_another_module_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a peft LoRA layer around a LossHead, got Linear"):
        adapt_head(torch.nn.Linear(3, 4))
    assert lora_of(LossHead(3, 4)) is None


# --- what comes and goes with a model -------------------------------------------------------------------------------


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_an_adapted_model_is_copied_and_saved_whole(way: str) -> None:
    """Value and gradients of the copy, which has weights of its own; it takes another adapter and merges."""
    model, layer = adapted()
    adapt_head(layer)
    case = case_of_pairs()
    expected = model(case.hidden, case.target, case.lam)
    expected.loss.backward()
    copied = COPIES[way](model)
    other = copied.base_model.model.lm_head
    assert type(other) is type(layer) and other is not layer
    copied.zero_grad()
    found = copied(case.hidden, case.target, case.lam)
    assert_same_loss(found, expected)
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in copied.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name]), name
    with torch.no_grad():
        other.lora_B["default"].weight.zero_()
    assert not torch.equal(copied(case.hidden, case.target, case.lam).loss, expected.loss)
    assert torch.equal(model(case.hidden, case.target, case.lam).loss, expected.loss)


def test_one_class_for_all_adapted_layers_of_a_kind() -> None:
    first, second = adapted()[1], adapted()[1]
    kind = type(first)
    assert type(adapt_head(first)) is type(adapt_head(second)) is adapted_class(kind)
    assert isinstance(first, kind)


def test_adapters_are_added_chosen_and_deleted_after_the_head_is_adapted() -> None:
    model, layer = adapted()
    adapt_head(layer)
    case = case_of_pairs()
    default = model(case.hidden, case.target, case.lam)
    model.add_adapter(
        "other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"], use_rslora=True)
    )
    with torch.no_grad():
        layer.lora_B["other"].weight.normal_()
    model.set_adapter("other")
    other = model(case.hidden, case.target, case.lam)
    assert_same_loss(other, merged_loss(model, case))
    assert not torch.isclose(other.loss, default.loss)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_same_loss(model(case.hidden, case.target, case.lam), default)
    assert_same_loss(default, merged_loss(model, case))


def test_unloaded_the_head_is_the_one_it_was() -> None:
    model, layer = adapted()
    head, body = adapt_head(layer).base_layer, model.base_model.model.body
    case = case_of_pairs()
    plain = model.unload()
    assert plain.lm_head is head and type(head) is LossHead
    expected = sftmix_loss(
        body(case.hidden), head.weight, case.target, case.lam, bias=head.bias, softcap=4.0, logit_scale=0.7,
        impl="reference",
    )  # fmt: skip
    assert_same_loss(plain(case.hidden, case.target, case.lam), expected)


def test_switched_off_while_merged_it_is_the_bases_loss() -> None:
    """As peft's own forward: it takes the merged adapter out of the weight again."""
    model, layer = adapted()
    adapt_head(layer)
    case = case_of_pairs()
    with model.disable_adapter():
        expected = model(case.hidden, case.target, case.lam)
    model.merge_adapter()
    assert not torch.isclose(model(case.hidden, case.target, case.lam).loss, expected.loss)
    with model.disable_adapter():
        assert_same_loss(model(case.hidden, case.target, case.lam), expected)


def test_an_adapted_model_compiles_whole() -> None:
    model, layer = adapted()
    adapt_head(layer)
    case = case_of_pairs()
    torch._dynamo.reset()
    inner = model.base_model.model
    loss = torch.compile(lambda h: inner(h, case.target, case.lam).loss, fullgraph=True, backend="aot_eager")(
        case.hidden
    )
    assert torch.equal(loss, inner(case.hidden, case.target, case.lam).loss)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora": None}, "lora: expected the layer's own adapter alone"),
        ({"adapter_names": ["default"] * 12}, "adapter_names: expected one of sftmix_loss's options"),
        ({"labels": None}, "labels: expected one of sftmix_loss's options, .*target"),
    ],
)
def test_an_adapted_layer_refuses_options_by_name(options: dict[str, Any], message: str) -> None:
    _, layer = adapted()
    adapt_head(layer)
    case = case_of_pairs()
    with pytest.raises(ValueError, match=message):
        layer(case.hidden, case.target, case.lam, **options)


def test_a_copy_of_the_head_that_is_saved_whole_computes_the_loss() -> None:
    model = peft.get_peft_model(
        Tiny(), peft.LoraConfig(r=R, target_modules=["body"], modules_to_save=["lm_head"])
    )
    wrapper = model.base_model.model.lm_head
    case = case_of_pairs()
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(0.5)
        expected = sftmix_loss(
            model.base_model.model.body(case.hidden), 0.5 * wrapper.original_module.weight, case.target, case.lam,
            bias=wrapper.original_module.bias, softcap=4.0, logit_scale=0.7, impl="reference",
        )  # fmt: skip
    assert_same_loss(model(case.hidden, case.target, case.lam), expected)


def test_an_adapter_of_the_parameter_is_lora_too() -> None:
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this peft adapts modules only")
    model = peft.get_peft_model(
        Tiny(), peft.LoraConfig(r=R, target_modules=[], target_parameters=["lm_head.weight"])
    )
    layer = adapt_head(model.base_model.model.lm_head)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    case = case_of_pairs()
    out = model(case.hidden, case.target, case.lam)
    assert_same_loss(out, merged_loss(model, case))
    out.loss.backward()
    assert layer.lora_A["default"].weight.grad.any() and layer.lora_B["default"].weight.grad.any()
