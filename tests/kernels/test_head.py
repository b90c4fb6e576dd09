"""LossHead: a linear layer whose forward is the loss."""

from __future__ import annotations

import torch
import torch.nn as nn

from sftmix_kernels import LossHead, sftmix_loss, token_stats
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
    options = {"bias": head.bias, "softcap": 3.0, "logit_scale": 0.5}
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
        lambda h: head(body(h), case.target, case.lam).loss, fullgraph=True, backend="aot_eager"
    )
    loss = compiled(case.hidden)
    assert torch.equal(loss, head(body(case.hidden), case.target, case.lam).loss)
    loss.backward()
    assert body.weight.grad is not None and body.weight.grad.any()
