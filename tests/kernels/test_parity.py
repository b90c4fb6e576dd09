"""``chunked`` and ``fused`` (Triton, in the interpreter where there is no GPU) against the reference."""

from __future__ import annotations

import pytest
import torch

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.parity import Case, assert_parity, assert_within_contract, make_case, run

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SERVED = [(impl, dtype) for impl in ("chunked", "fused") for dtype in (F32, F16, BF16)]
served = pytest.mark.parametrize("impl,dtype", SERVED, ids=[f"{i}-{str(d)[6:]}" for i, d in SERVED])

# N, V, D, M, and why this shape.
SHAPES = [
    (32, 64, 32, 16, "everything a multiple of 16, no unpaired row"),
    (33, 131, 50, 13, "nothing a multiple of anything, 7 unpaired rows"),
    (1, 1, 1, 0, "the smallest: one class, p = 1"),
    (2, 300, 3, 1, "one pair, D below a tile's smallest block"),
    (70, 17, 129, 5, "V below a block, D just past one, mostly unpaired"),
    (65, 257, 40, 0, "plain next-token loss, each size one past a power of two"),
]


@served
@pytest.mark.parametrize("shape", SHAPES, ids=[s[4] for s in SHAPES])
def test_shapes(impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int, str]) -> None:
    num_rows, vocab_size, width, num_pairs, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype)
    assert_parity(case, impl=impl, scratch_bytes=6 * 4 * vocab_size * 3)


@served
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, None])
def test_lam(impl: str, dtype: torch.dtype, lam: float | None) -> None:
    assert_parity(make_case(40, 90, 24, num_pairs=17, dtype=dtype, lam=lam), impl=impl)


@served
@pytest.mark.parametrize(
    "options",
    [{"softcap": 4.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}, {"mixup_weight": 1.5}],
    ids=str,
)
def test_bias_softcap_scale_and_weight(impl: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    assert_parity(make_case(37, 70, 20, num_pairs=15, dtype=dtype, bias=True, **options), impl=impl)


SMOOTHED = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 4.0},
]


@served
@pytest.mark.parametrize("options", SMOOTHED, ids=str)
def test_label_smoothing_and_z_loss(impl: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    case = make_case(
        37, 70, 20, num_pairs=15, dtype=dtype, bias=True, ignored=(3, 18), logit_scale=0.8, **options
    )
    case.target[5] = case.target[20]
    assert_parity(case, impl=impl, scratch_bytes=70 * 4 * 12)


@served
@pytest.mark.parametrize("ignored", [(), (4, 7)], ids=str)
def test_reduction_none_takes_any_upstream_gradient(
    impl: str, dtype: torch.dtype, ignored: tuple[int, ...]
) -> None:
    """Each row's gradient is its own upstream's, also 0, negative, and very different from its neighbour's."""
    case = make_case(30, 70, 24, dtype=dtype, ignored=ignored, bias=True)
    upstream = torch.linspace(-2, 3, 30)
    upstream[9] = 0

    def gradients(name: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [
            t.detach().to(wide).requires_grad_()
            for t in (case.hidden, case.weight, case.bias)
            if t is not None
        ]
        losses = linear_cross_entropy(
            leaves[0].view(5, 6, 24),
            leaves[1],
            case.target.view(5, 6),
            bias=leaves[2],
            reduction="none",
            impl=name,
        )
        assert losses.shape == (5, 6)
        losses.backward(upstream.view(5, 6).to(losses.dtype))
        return [losses.detach().flatten(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    ours, same, truth = (
        gradients(impl, dtype),
        gradients("reference", dtype),
        gradients("reference", torch.float64),
    )
    for name, *results in zip(("losses", "dhidden", "dweight", "dbias"), ours, same, truth, strict=True):
        assert_within_contract(name, *results)
    assert not ours[1][9].any() and all(not ours[1][row].any() and ours[0][row] == 0 for row in ignored)


@served
def test_row_and_pair_weights_and_denominators(impl: str, dtype: torch.dtype) -> None:
    case = make_case(37, 70, 20, num_pairs=15, dtype=dtype)
    case.options = {
        "row_weight": torch.rand(37), "pair_weight": torch.rand(15) * 3, "ntp_denominator": 3001,
        "mixup_denominator": torch.tensor(7), "mixup_weight": torch.tensor(0.4),
    }  # fmt: skip
    case.options["row_weight"][5] = 0
    assert_parity(case, impl=impl)


@served
@pytest.mark.parametrize("ignore_index", [-100, 0, 69])
def test_ignored_on_either_side_of_a_pair(impl: str, dtype: torch.dtype, ignore_index: int) -> None:
    """Rows 0 (confident), 16 (a partner), 2 and 17 (both members of one pair) and 36 (unpaired)."""
    case = make_case(
        37, 70, 20, num_pairs=15, dtype=dtype, ignored=(0, 16, 2, 17, 36), ignore_index=ignore_index
    )
    out = assert_parity(case, impl=impl)
    assert out["mixup_nll"][0] == 0 and out["mixup_nll"][1] == 0 and out["mixup_nll"][2] == 0
    assert out["nll"][0] == 0 and out["nll"][1] > 0 and not out["dhidden"][2].any()


@served
@pytest.mark.parametrize("num_rows,num_pairs", [(12, 5), (0, 0), (3, 0)])
def test_all_ignored_and_no_rows_give_zero_attached_to_the_graph(
    impl: str, dtype: torch.dtype, num_rows: int, num_pairs: int
) -> None:
    case = make_case(num_rows, 20, 8, num_pairs=num_pairs, dtype=dtype, ignored=tuple(range(num_rows)))
    out = run(case, impl=impl)
    assert out["loss"] == 0
    assert out["dhidden"].shape == (num_rows, 8) and not out["dhidden"].any()
    assert out["dweight"].shape == (20, 8) and not out["dweight"].any()


@served
def test_equal_labels_in_a_pair(impl: str, dtype: torch.dtype) -> None:
    case = make_case(20, 50, 16, num_pairs=10, dtype=dtype)
    case.target[10:] = case.target[:10]
    assert_parity(case, impl=impl)


@served
def test_target_in_the_last_column(impl: str, dtype: torch.dtype) -> None:
    case = make_case(20, 131, 16, num_pairs=8, dtype=dtype)
    case.target[:] = 130
    assert_parity(case, impl=impl)


def peaked_case(dtype: torch.dtype, *, num_pairs: int, margin: float = 18.0) -> Case:
    """Orthogonal one-hot rows: each target's logit stands ``margin`` above 63 others, exactly in every dtype."""
    hidden = torch.eye(64)[torch.arange(24) % 8] * margin
    weight = torch.eye(64)
    return Case(hidden.to(dtype), weight.to(dtype), torch.arange(24) % 8, torch.rand(num_pairs), None, {})


@served
@pytest.mark.parametrize("num_pairs", [0, 8])
def test_target_gradient_at_high_confidence(impl: str, dtype: torch.dtype, num_pairs: int) -> None:
    """p = 0.999999 at the target: 1 - p must survive. Rounding p to 16 bits first would lose all of it."""
    case = peaked_case(dtype, num_pairs=num_pairs)
    case.upstream = (
        2.0**16 if dtype is F16 else 1.0
    )  # unscaled, the result is below float16's smallest number
    truth = run(case, impl="reference", dtype=torch.float64)
    ours = run(case, impl=impl)
    assert (truth["nll"][:8] < 1.1e-6).all() and (truth["dhidden"][0, 0] != 0)
    picked = case.target[:, None]
    got, want = (t["dhidden"].double().gather(1, picked) for t in (ours, truth))
    # A float32 sum of exponentials just above 1 is off by an ulp and a half at most, 2^-23 each, and 1 - p is 8 of
    # them; float16 rounds 1 - p and its product to multiples of 2^-24. Coefficients are 1/24 and 0.2/8.
    known = 1.5 * 2.0**-23 + (2.0**-24 if dtype is F16 else 0)
    assert known < 0.3 * 9.6e-7  # far below what is tested, so a lost 1 - p cannot pass
    known *= case.upstream * (1 / 24 + 0.2 / 8 if num_pairs else 1 / 24)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=known)
    if dtype is F32:
        assert_within_contract("dhidden", *(r["dhidden"] for r in (ours, run(case, impl="reference"), truth)))


@served
@pytest.mark.parametrize("num_pairs", [0, 8])
def test_logits_of_ten_thousand(impl: str, dtype: torch.dtype, num_pairs: int) -> None:
    case = make_case(24, 40, 16, num_pairs=num_pairs, dtype=F32, logit_std=1e4)
    case.hidden, case.weight = case.hidden.to(dtype), case.weight.to(dtype)
    assert_parity(case, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("num_pairs", [0, 10])
def test_float16_with_an_upstream_gradient_of_65536(impl: str, num_pairs: int) -> None:
    assert_parity(make_case(4096, 60, 16, num_pairs=num_pairs, dtype=F16, upstream=2.0**16), impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_float16_gradients_of_many_rows_do_not_flush_to_zero(impl: str) -> None:
    """1/N would push most dlogits under float16's smallest number if they were rounded after it."""
    case = make_case(8192, 128, 8, dtype=F16)
    truth, ours = run(case, impl="reference", dtype=torch.float64), run(case, impl=impl)
    error = (ours["dweight"].double() - truth["dweight"]).norm() / truth["dweight"].norm()
    assert error < 1e-3


@served
def test_mixup_weight_zero_is_next_token_loss_bit_for_bit(impl: str, dtype: torch.dtype) -> None:
    case = make_case(20, 50, 16, num_pairs=8, dtype=dtype)
    plain = Case(case.hidden, case.weight, case.target, case.lam[:0])
    zero, ntp = run(case, impl=impl, mixup_weight=0), run(plain, impl=impl)
    for name in ("loss", "nll", "lse", "dhidden", "dweight"):
        assert torch.equal(zero[name], ntp[name]), name
    assert zero["mixup_nll"].shape == (8,) and zero["mixup_nll"].isnan().all()
    tensor = run(case, impl=impl, mixup_weight=torch.tensor(0.0))
    assert not tensor["mixup_nll"].isnan().any()


@served
def test_two_runs_are_bitwise_equal(impl: str, dtype: torch.dtype) -> None:
    case = make_case(37, 131, 50, num_pairs=13, dtype=dtype, bias=True)
    first, second = run(case, impl=impl), run(case, impl=impl)
    assert all(torch.equal(first[k], second[k]) for k in first)


@served
def test_top1_and_token_stats(impl: str, dtype: torch.dtype) -> None:
    case = make_case(33, 70, 24, dtype=dtype, ignored=(4,), bias=True, softcap=5.0)
    args = {"bias": case.bias, "softcap": 5.0}
    ours = token_stats(case.hidden, case.weight, case.target, impl=impl, **args)
    torch_ = token_stats(case.hidden, case.weight, case.target, impl="reference", **args)
    wide = {"bias": case.bias.double(), "softcap": 5.0} if case.bias is not None else {}
    truth = token_stats(case.hidden.double(), case.weight.double(), case.target, impl="reference", **wide)
    for name in ("logprob", "lse", "entropy"):
        assert_within_contract(name, *(getattr(r, name) for r in (ours, torch_, truth)))
    margin = (
        (case.hidden.double() @ case.weight.double().T + wide["bias"])
        .topk(2, dim=1)
        .values.diff()
        .abs()
        .squeeze()
    )
    clear = margin > 0.1  # elsewhere a 16-bit logit may tip it
    assert clear.sum() > 20 and torch.equal(ours.is_top1[clear], truth.is_top1[clear])


@served
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_is_torchs(impl: str, dtype: torch.dtype, reduction: str) -> None:
    case = make_case(30, 70, 24, dtype=dtype, ignored=(4,), bias=True)
    assert case.bias is not None
    hidden = case.hidden.view(5, 6, 24).requires_grad_()
    loss = linear_cross_entropy(
        hidden, case.weight, case.target.view(5, 6), bias=case.bias, reduction=reduction, impl=impl
    )
    logits = case.hidden.double() @ case.weight.double().T + case.bias.double()
    truth = torch.nn.functional.cross_entropy(logits, case.target, reduction=reduction)
    torch.testing.assert_close(loss.double(), truth, rtol={F32: 1e-6, F16: 1e-3, BF16: 8e-3}[dtype], atol=0)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    one = linear_cross_entropy(case.hidden[0], case.weight, case.target[0], bias=case.bias, impl=impl)
    torch.testing.assert_close(
        one.double(), torch.nn.functional.cross_entropy(logits[0], case.target[0]), rtol=1e-2, atol=1e-2
    )


@served
def test_frozen_inputs_get_no_gradient(impl: str, dtype: torch.dtype) -> None:
    case = make_case(20, 50, 16, num_pairs=8, dtype=dtype)
    both = run(case, impl=impl)
    for frozen, name in (("weight", "dhidden"), ("hidden", "dweight")):
        tensors = {k: getattr(case, k).clone().requires_grad_(k != frozen) for k in ("hidden", "weight")}
        sftmix_loss(tensors["hidden"], tensors["weight"], case.target, case.lam, impl=impl).loss.backward()
        assert tensors[frozen].grad is None
        other = "hidden" if frozen == "weight" else "weight"
        assert torch.equal(tensors[other].grad, both[name])
