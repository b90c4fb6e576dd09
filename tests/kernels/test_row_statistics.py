"""Statistics of rows that carry gradients, log-probabilities of given tokens, and what all options hold in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from sftmix_kernels import LossHead, TokenStats, linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.test_row_options import class_weights
from tests.kernels.watching import LargestTensor
from tests.kernels.ways import every_way, gradients, impls, leaf
from tests.parity import assert_within_contract, make_case

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SERVED = [("chunked", F32), ("chunked", BF16), ("fused", F32), ("fused", F16)]
served = pytest.mark.parametrize("impl,dtype", SERVED, ids=[f"{i}-{str(d)[6:]}" for i, d in SERVED])
N, V, D, K = 23, 131, 20, 4
FIELDS = ("logprob", "lse", "entropy", "token_logprob")
GRADIENTS = ("dhidden", "dweight", "dbias", "dA", "dB")
CASE = make_case(N, V, D, bias=True, ignored=(4, 17))


def given_tokens() -> Tensor:
    """Several a row: the target among them, one twice, the last column, some ignored, a row of none."""
    tokens = torch.randint(0, V, (N, K), generator=torch.Generator().manual_seed(1))
    tokens[0] = CASE.target[0]
    tokens[1, 1:3] = 7
    tokens[2] = torch.tensor([V - 1, V - 1, 0, V - 1])
    tokens[5, 2] = -100
    tokens[6] = -100
    return tokens


def upstreams(fields: tuple[str, ...]) -> list[Tensor]:
    """Each row's and token's own: negative, 0, large beside small."""
    g = torch.Generator().manual_seed(2)
    found = []
    for name in fields:
        each = torch.randn((N, K) if name == "token_logprob" else (N,), generator=g) * 2
        each[9] = 0
        each[10] *= 50
        found.append(each)
    return found


def results(
    impl: str, dtype: torch.dtype, wide: torch.dtype, fields: tuple[str, ...], **options: Any
) -> dict[str, Tensor]:
    """Values of ``fields`` and gradients of hidden, weight, bias and both factors."""
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(3, D, generator=g) / 4, torch.randn(V, 3, generator=g)
    assert CASE.bias is not None
    inputs = leaf(*(t.to(dtype).to(wide) for t in (CASE.hidden, CASE.weight, CASE.bias, *factors)))

    def statistics(hidden: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> list[Tensor]:
        found = token_stats(
            hidden, weight, CASE.target, bias=bias, lora=(down, up, 0.5), tokens=given_tokens(),
            differentiable=True, impl=impl, **options,
        )  # fmt: skip
        return [getattr(found, name) for name in fields]

    values = [value.detach() for value in statistics(*inputs)]
    found = gradients(statistics, inputs, upstreams(fields))
    return dict(zip((*fields, *GRADIENTS), (*values, *found), strict=True))


COMBINATIONS = [FIELDS, *((name,) for name in FIELDS), ("lse", "token_logprob"), ("logprob", "entropy")]


@served
@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda f: "+".join(f))
def test_gradients_of_any_upstream(impl: str, dtype: torch.dtype, fields: tuple[str, ...]) -> None:
    """All of them, each alone, some: a statistic without an upstream adds nothing."""
    ours = results(impl, dtype, dtype, fields, scratch_bytes=V * dtype.itemsize * 7)
    same, truth = (results("reference", dtype, wide, fields) for wide in (dtype, F64))
    for name in ours:
        assert_within_contract(name, ours[name], same[name], truth[name])
    assert ours["dweight"].any() and not ours["dhidden"][9].any()
    assert "lse" in fields or "entropy" in fields or not ours["dhidden"][[4, 17]].any()


@served
@pytest.mark.parametrize(
    "options", [{"softcap": 4.0}, {"softcap": 2.0, "logit_scale": 1.7}, {"logit_scale": 0.3}], ids=str
)
def test_gradients_through_cap_and_scale(impl: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    ours = results(impl, dtype, dtype, FIELDS, **options)
    same, truth = (results("reference", dtype, wide, FIELDS, **options) for wide in (dtype, F64))
    for name in ours:
        assert_within_contract(name, ours[name], same[name], truth[name])


@pytest.mark.parametrize("fields", [FIELDS, ("entropy",)], ids=lambda f: "+".join(f))
def test_chunked_gradients_agree_with_finite_differences(fields: tuple[str, ...]) -> None:
    case = make_case(5, 9, 4, dtype=F64, bias=True, ignored=(3,))
    tokens = torch.tensor([[0, 1], [2, 2], [8, -100], [1, 1], [5, 0]])

    def statistics(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = token_stats(
            *inputs[:2], case.target, bias=inputs[2], tokens=tokens, differentiable=True, impl="chunked",
            scratch_bytes=150,
        )  # fmt: skip
        return tuple(getattr(found, name) for name in fields)

    assert case.bias is not None
    assert torch.autograd.gradcheck(statistics, tuple(leaf(case.hidden, case.weight, case.bias)))


@impls
def test_detached_unless_asked(impl: str) -> None:
    """The same numbers either way; tokens change no other field; each field has its own shape and dtype."""
    inputs, tokens = leaf(CASE.hidden, CASE.weight), given_tokens()
    plain = token_stats(*inputs, CASE.target, impl=impl)
    assert plain.token_logprob is None and plain.predicted is None
    detached = token_stats(*inputs, CASE.target, tokens=tokens, impl=impl)
    attached = token_stats(*inputs, CASE.target, tokens=tokens, differentiable=True, impl=impl)
    assert isinstance(attached, TokenStats)
    for name in FIELDS:
        one, other = getattr(detached, name), getattr(attached, name)
        assert not one.requires_grad and other.requires_grad and torch.equal(one, other)
        assert name == "token_logprob" or torch.equal(one, getattr(plain, name))
        assert one.shape == ((N, K) if name == "token_logprob" else (N,)) and one.dtype == F32
    assert torch.equal(attached.is_top1, plain.is_top1) and not attached.is_top1.requires_grad
    with torch.no_grad():
        assert not token_stats(*inputs, CASE.target, differentiable=True, impl=impl).lse.requires_grad


@impls
def test_log_probabilities_of_given_tokens(impl: str) -> None:
    tokens = given_tokens()
    found = token_stats(CASE.hidden, CASE.weight, CASE.target, tokens=tokens, impl=impl).token_logprob
    assert found is not None
    logprobs = (CASE.hidden.double() @ CASE.weight.double().T).log_softmax(1)
    given = (tokens >= 0) & (CASE.target >= 0)[:, None]
    expected = torch.where(given, logprobs.gather(1, tokens.clamp(min=0)), 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[~given].any() and given.sum() > 70
    for size in (0, 1, 9):  # no token, one, more than a power of two
        few = token_stats(
            CASE.hidden, CASE.weight, CASE.target, tokens=tokens[:, :1].expand(-1, size), impl=impl
        )
        assert few.token_logprob is not None
        torch.testing.assert_close(
            few.token_logprob.double(), expected[:, :1].expand(-1, size), rtol=1e-5, atol=1e-5
        )


@impls
def test_tokens_that_are_none(impl: str) -> None:
    wrong: list[Any] = [
        torch.zeros(N, dtype=torch.int64), torch.zeros(N + 1, K, dtype=torch.int64), torch.zeros(N, K),
        torch.full((N, K), V), torch.full((N, K), -1), [[1, 2]],
    ]  # fmt: skip
    for tokens in wrong:
        with pytest.raises(ValueError, match=r"^tokens: expected .*got "):
            token_stats(CASE.hidden, CASE.weight, CASE.target, tokens=tokens, impl=impl)


@impls
def test_through_a_head(impl: str) -> None:
    """LossHead hands them on, its own cap and bias included."""
    head = LossHead(D, V, bias=True, softcap=5.0)
    found = head(
        CASE.hidden, CASE.target, stats=True, tokens=given_tokens(), differentiable=True, want_predicted=True,
        impl=impl,
    )  # fmt: skip
    assert isinstance(found, TokenStats) and found.predicted is not None and found.token_logprob is not None
    logits = 5 * torch.tanh(torch.nn.functional.linear(CASE.hidden, head.weight, head.bias) / 5)
    torch.testing.assert_close(found.lse, logits.logsumexp(1))
    found.entropy.sum().backward()
    assert head.weight.grad is not None and head.weight.grad.any()


# --- memory ----------------------------------------------------------------------------------------------------------

WIDE, ROWS = 4096, 64
SCRATCH = 6 * WIDE * 4
MEMORY: dict[str, dict[str, Any]] = {
    "class weights, smoothing": {"class_weight": class_weights(WIDE), "label_smoothing": 0.1},
    "token scaling, predicted": {"token_scaling": True, "want_predicted": True, "z_loss": 0.1},
}


@every_way
@pytest.mark.parametrize("options", MEMORY)
def test_the_loss_makes_no_tensor_of_all_logits(way: dict[str, Any], options: str) -> None:
    case = make_case(ROWS, WIDE, 16, num_pairs=20)

    def largest(rows: int) -> int:
        hidden, weight = leaf(case.hidden[:rows], case.weight)
        with LargestTensor() as seen:
            loss = sftmix_loss(
                hidden, weight, case.target[:rows], case.lam[: rows // 4], scratch_bytes=SCRATCH, **way,
                **MEMORY[options],
            ).loss  # fmt: skip
            torch.autograd.grad(loss, (hidden, weight))
        return seen.nbytes

    if way["impl"] == "reference":  # which does, so the limit is one that can be passed
        assert largest(ROWS) >= ROWS * WIDE * 4
    else:
        assert 0 < largest(ROWS) < ROWS * WIDE * 4 / 2


@impls
@pytest.mark.parametrize("kind", ["statistics", "rows"])
def test_rows_make_no_tensor_of_all_logits(impl: str, kind: str) -> None:
    case = make_case(ROWS, WIDE, 16)
    hidden, weight = leaf(case.hidden, case.weight)
    tokens = torch.randint(0, WIDE, (ROWS, K))
    with LargestTensor() as seen:
        if kind == "rows":
            output = linear_cross_entropy(
                hidden, weight, case.target, reduction="none", token_scaling=True, label_smoothing=1.0,
                class_weight=class_weights(WIDE), impl=impl, scratch_bytes=SCRATCH,
            ).sum()  # fmt: skip
        else:
            found = token_stats(
                hidden, weight, case.target, tokens=tokens, differentiable=True, want_predicted=True, impl=impl,
                scratch_bytes=SCRATCH,
            )  # fmt: skip
            assert found.token_logprob is not None
            output = found.entropy.sum() + found.lse.sum() + found.token_logprob.sum()
        torch.autograd.grad(output, (hidden, weight))
    assert (
        (seen.nbytes >= ROWS * WIDE * 4) if impl == "reference" else (0 < seen.nbytes < ROWS * WIDE * 4 / 2)
    )


@pytest.mark.parametrize("options", MEMORY)
def test_chunked_holds_its_scratch_and_the_gradients(options: str) -> None:
    """Traced: gradients made in the forward, the scratch, and less than an eighth of the logits beside them."""
    case = make_case(ROWS, WIDE, 16, num_pairs=20)
    hidden, weight = leaf(case.hidden, case.weight)

    def call() -> tuple[Tensor, ...]:
        loss = sftmix_loss(
            hidden, weight, case.target, case.lam, impl="chunked", scratch_bytes=SCRATCH, **MEMORY[options]
        ).loss
        return torch.autograd.grad(loss, (hidden, weight))

    peak = peak_bytes(call, "cpu") - hidden.nbytes - weight.nbytes
    assert SCRATCH / 2 < peak < SCRATCH + ROWS * WIDE * 4 / 8 + weight.nbytes
