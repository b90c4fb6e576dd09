"""LossHead: a linear layer whose forward is the loss."""

from __future__ import annotations

import copy
import inspect
import pickle
import typing
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sftmix_kernels import LossHead, LossOptions, StatsOptions, sftmix_loss, token_stats
from sftmix_kernels.head import OWN
from tests.parity import make_case


def test_without_a_target_it_is_the_linear_layer() -> None:
    linear = nn.Linear(6, 11)
    head = LossHead.from_linear(linear, softcap=3.0, logit_scale=0.5)
    hidden = torch.randn(2, 3, 6)
    assert torch.equal(head(hidden), linear(hidden))


def test_parameters_are_shared_and_keep_their_names() -> None:
    embedding, linear = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    linear.weight = embedding.weight
    head = LossHead.from_linear(linear)
    assert head.weight is embedding.weight and head.bias is None
    assert list(head.state_dict()) == ["weight"]


def test_loss_and_statistics_use_the_heads_bias_cap_and_scale() -> None:
    case = make_case(12, 11, 6, num_pairs=5)
    head = LossHead(6, 11, bias=True, softcap=3.0, logit_scale=0.5)
    options: dict[str, Any] = {"bias": head.bias, "softcap": 3.0, "logit_scale": 0.5}
    out = head(case.hidden, case.target, case.lam, mixup_weight=0.7)
    expected = sftmix_loss(case.hidden, head.weight, case.target, case.lam, mixup_weight=0.7, **options)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.mixup_nll, expected.mixup_nll)
    out.loss.backward()
    assert head.weight.grad is not None and head.bias is not None and head.bias.grad is not None
    stats = head(case.hidden, case.target, stats=True)
    assert torch.equal(stats.logprob, token_stats(case.hidden, head.weight, case.target, **options).logprob)
    plain = head(case.hidden, case.target)
    assert plain.mixup_nll.shape == (0,)
    torch.testing.assert_close(plain.nll, expected.nll)


def test_a_compiled_model_contains_it() -> None:
    case = make_case(12, 11, 6, num_pairs=5)
    head = LossHead(6, 11)
    body = nn.Linear(6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h: head(body(h), case.target, case.lam, mixup_weight=0.3).loss, fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    loss = compiled(case.hidden)
    assert torch.equal(loss, head(body(case.hidden), case.target, case.lam, mixup_weight=0.3).loss)
    loss.backward()
    assert body.weight.grad is not None and body.weight.grad.any()


def test_it_shows_and_keeps_its_cap_and_scale() -> None:
    head = LossHead(6, 11, bias=True, softcap=3.0, logit_scale=0.5)
    shown = "LossHead(in_features=6, out_features=11, bias=True, softcap=3.0, logit_scale=0.5)"
    for same in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert repr(same) == shown


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, function", [(LossOptions, sftmix_loss), (StatsOptions, token_stats)])
def test_typed_options_are_the_functions_own(options: Any, function: Any) -> None:
    """A keyword that the loss gains and the head does not know, or of another type, is noticed here.

    Any type passes for a group there, so that torch.distributed is not needed; not for a reader of the head's types.
    """
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OWN}
    written = {
        name: value.__forward_arg__ if isinstance(value, typing.ForwardRef) else value
        for name, value in options.__annotations__.items()
    }
    for name in ("vocab_parallel", "exchange"):
        assert written.pop(name) and keywords.pop(name) == "Any"
    assert written == keywords


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"labels": None},
            "labels: expected one of sftmix_loss's options, .*targets are the second argument",
        ),
        ({"mixup_wieght": 0.1}, "mixup_wieght: expected one of sftmix_loss's options, .*mixup_weight"),
        ({"softcap": 3.0}, "softcap: expected it on the head, where sftmix_loss takes it from"),
        ({"bias": None}, "bias: expected it on the head"),
        ({"stats": True, "z_loss": 0.1}, "z_loss: expected one of token_stats's options, differentiable"),
        ({"stats": True, "lam": torch.rand(2)}, "lam: expected None with stats=True"),
    ],
)
@pytest.mark.parametrize("target", [True, False], ids=["target", "no target"])
def test_options_it_does_not_know_are_named(options: dict[str, Any], message: str, target: bool) -> None:
    case = make_case(8, 11, 6)
    head = LossHead(6, 11)
    if not target and "lam" in options:
        message = "target: expected int64"
    with pytest.raises(ValueError, match=message):
        head(case.hidden, *([case.target] if target else []), **options)


def test_every_option_of_the_loss_reaches_it() -> None:
    case = make_case(12, 11, 6, num_pairs=5)
    head = LossHead(6, 11)
    options: dict[str, Any] = {
        "mixup_weight": 0.7, "row_weight": torch.rand(12), "pair_weight": torch.rand(5), "ntp_denominator": 7,
        "mixup_denominator": 3.0, "ignore_index": int(case.target[3]), "label_smoothing": 0.1, "z_loss": 0.01,
        "impl": "chunked", "scratch_bytes": 64,
    }  # fmt: skip
    found = head(case.hidden, case.target, case.lam, **options)
    options |= {"impl": "reference", "scratch_bytes": None}
    expected = sftmix_loss(case.hidden, head.weight, case.target, case.lam, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    assert not torch.isclose(found.loss, head(case.hidden, case.target, case.lam).loss)


# --- another layer in its place -------------------------------------------------------------------------------------


def tiny_llama(tied: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.lm_head = LossHead.from_linear(model.lm_head, softcap=3.0, logit_scale=0.5)
    return model


@pytest.mark.parametrize("size", [13, 9])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary_keeps_the_head(tied: bool, size: int) -> None:
    model = tiny_llama(tied)
    old = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    head = model.lm_head
    assert type(head) is LossHead and (head.softcap, head.logit_scale) == (3.0, 0.5)
    assert (head.weight is model.model.embed_tokens.weight) == tied
    assert head.weight.shape == (size, 8) and torch.equal(head.weight[:9], old[:9])
    hidden, target = torch.randn(5, 8), torch.randint(size, (5,))
    logits = 3.0 * torch.tanh(0.5 * (hidden @ head.weight.T) / 3.0)
    torch.testing.assert_close(head(hidden, target).loss, F.cross_entropy(logits, target))


def test_a_layer_of_the_same_size_or_another_kind_replaces_the_head() -> None:
    """Only what a resized vocabulary looks like is taken for one."""
    model = nn.Module()
    for other in (nn.Linear(6, 11), nn.Linear(7, 12), nn.Identity()):
        model.head = LossHead(6, 11)
        model.head = other
        assert model.head is other
    model.other = nn.Linear(6, 12)
    assert type(model.other) is nn.Linear
