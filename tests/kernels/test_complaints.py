"""What users of other losses reported, one named test each; README.md beside this file is the table.

Names are ``test_<project>_<issue>_<what must hold>``; each test is ours, built so that the reported fault fails it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import LossHead, linear_cross_entropy, sftmix_loss, token_stats
from tests.parity import Case, assert_parity, make_case, run

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SERVED = [(impl, dtype) for impl in ("chunked", "fused") for dtype in (F32, F16, BF16)]
served = pytest.mark.parametrize("impl,dtype", SERVED, ids=[f"{i}-{str(d)[6:]}" for i, d in SERVED])
sixteen_bits = pytest.mark.parametrize(
    "impl,dtype",
    [s for s in SERVED if s[1] is not F32],
    ids=["chunked-float16", "chunked-bfloat16", "fused-float16", "fused-bfloat16"],
)
implementations = pytest.mark.parametrize("impl", ["chunked", "fused"])


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# --- Precision -----------------------------------------------------------------------------------------------------


@sixteen_bits
def test_liger_512_dweight_sums_do_not_stall(impl: str, dtype: torch.dtype) -> None:
    """4,096 equal rows, a few at a time: a running sum of 16 bits stops growing after 256 (2,048) of them.

    Also xtuner 1747, Megatron 2206 and 2739, apple 14 and 18.
    """
    case = make_case(4096, 20, 8, dtype=dtype)
    case.hidden, case.target = case.hidden[:1].repeat(4096, 1), case.target[:1].repeat(4096)
    truth = run(case, impl="reference", dtype=F64)["dweight"]
    ours = run(case, impl=impl, scratch_bytes=20 * 4 * 3)["dweight"]
    assert relative_error(ours, truth) < 2 * torch.finfo(dtype).eps


@sixteen_bits
def test_trl_dhidden_is_not_rounded_at_every_slice_of_the_vocabulary(impl: str, dtype: torch.dtype) -> None:
    """Slices of a handful of columns: rounding each one's product would add an error per slice."""
    case = make_case(64, 8192, 8, dtype=dtype, logit_std=0.3)
    truth, torch_ = run(case, impl="reference", dtype=F64), run(case, impl="reference")
    ours = run(case, impl=impl, scratch_bytes=64 * 2 * 512)
    want = relative_error(torch_["dhidden"], truth["dhidden"])
    assert relative_error(ours["dhidden"], truth["dhidden"]) < 1.5 * want


@served
@pytest.mark.parametrize("margin", [5.0, 7.0, 9.0, 12.0, 14.0])
def test_liger_1329_target_gradient_at_high_confidence(impl: str, dtype: torch.dtype, margin: float) -> None:
    """One logit stands ``margin`` above three others, p = 0.98 to 0.999998: p - 1 has the dtype's relative accuracy.

    With p rounded before 1 is subtracted the error is 20 % at 0.99 and 100 % from 0.999 on. Also Liger 1419.
    """
    hidden = (margin * torch.eye(4)).repeat(2, 1).to(dtype)
    case = Case(
        hidden, torch.eye(4).to(dtype), torch.arange(8) % 4, torch.empty(0), None, {"ntp_denominator": 1}
    )
    gradient = run(case, impl=impl)["dhidden"].double().gather(1, case.target[:, None]).squeeze(1)
    others = 3 * torch.exp(torch.tensor(-margin, dtype=F64))
    expected = -others / (1 + others)
    # log p is known to float32's rounding of the logit, 2^-23 margin: 67 % of the smallest of these gradients.
    allowed = torch.finfo(dtype).eps + 2**-23 * margin / -expected
    assert ((gradient - expected) / expected).abs().max() < allowed < 0.7


# --- Wrong results -------------------------------------------------------------------------------------------------


@served
def test_liger_968_reduction_none_takes_any_upstream(impl: str, dtype: torch.dtype) -> None:
    """Every row its own upstream gradient, zeros and signs included: not all rows times the first. Also Liger 1298."""
    case = make_case(40, 50, 16, dtype=dtype, ignored=(3,), bias=True)
    assert case.bias is not None
    upstream = torch.linspace(-2, 3, 40)
    upstream[7] = 0

    def gradients(impl: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [
            t.to(dtype).requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None
        ]
        hidden, weight, bias = leaves
        loss = linear_cross_entropy(hidden, weight, case.target, bias=bias, reduction="none", impl=impl)
        assert loss.shape == (40,) and loss[3] == 0
        return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))

    truth, torch_, ours = gradients("reference", F64), gradients("reference", dtype), gradients(impl, dtype)
    for got, same, want in zip(ours, torch_, truth, strict=True):
        assert relative_error(got, want) <= 2 * relative_error(same, want) + torch.finfo(dtype).eps
    assert not ours[0][7].any() and not ours[0][3].any()


@implementations
@pytest.mark.parametrize("ignored", [(0,), (5, 6, 19), tuple(range(20))])
def test_liger_1338_compile_with_an_ignored_row(impl: str, ignored: tuple[int, ...]) -> None:
    """The compiled loss counts the rows of each call: a denominator frozen at tracing would be another call's."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w, t, s: sftmix_loss(h, w, t, s, impl=impl).loss, fullgraph=True, backend="aot_eager"
    )
    for mask in ((), ignored):
        case = make_case(20, 33, 16, num_pairs=6, ignored=mask)
        hidden = case.hidden.requires_grad_()
        loss = compiled(hidden, case.weight, case.target, case.lam)
        (gradient,) = torch.autograd.grad(loss, hidden)
        want = run(case, impl="reference", dtype=F64)
        torch.testing.assert_close(loss.double(), want["loss"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient.double(), want["dhidden"], rtol=1e-5, atol=1e-7)


@implementations
@pytest.mark.parametrize("ignore_index", [-100, -1, 33, 63, 64, 511, 512, 2**31 + 5, -(2**40)])
def test_apple_59_a_sentinel_never_matches_a_padded_column(impl: str, ignore_index: int) -> None:
    """33 classes in a tile of 64 or 512: whatever value marks a row as ignored, no column past the end is its label."""
    case = make_case(24, 33, 16, num_pairs=8, ignored=(0, 9, 23), ignore_index=ignore_index)
    out = assert_parity(case, impl=impl)
    assert not out["nll"][[0, 9, 23]].any() and not out["is_top1"][[0, 9, 23]].any()
    assert not out["dhidden"][[0, 23]].any()


@implementations
def test_apple_53_bias_added_once(impl: str) -> None:
    """Hidden states of zeros, wider than a tile and cut into slices: the logits are the bias, once; mixtures too."""
    bias = torch.randn(700) * 3
    target = torch.randint(0, 700, (20,))
    out = sftmix_loss(
        torch.zeros(20, 600),
        torch.randn(700, 600),
        target,
        torch.rand(6),
        bias=bias,
        impl=impl,
        scratch_bytes=1,
    )
    lse = torch.logsumexp(bias.double(), 0).float()
    torch.testing.assert_close(out.lse, lse.expand(20), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.nll, lse - bias[target], rtol=1e-5, atol=1e-6)
    twin = sftmix_loss(
        torch.zeros(12, 600), torch.randn(700, 600), target[:6].repeat(2), torch.rand(6), bias=bias, impl=impl
    )
    torch.testing.assert_close(twin.mixup_nll, lse - bias[target[:6]], rtol=1e-5, atol=1e-6)


@implementations
def test_unsloth_5230_last_turn_masks(impl: str) -> None:
    """Only the last 3 of 400 rows are supervised: they alone get gradients, and not zeros."""
    case = make_case(400, 60, 16, ignored=tuple(range(397)))
    out = assert_parity(case, impl=impl, scratch_bytes=60 * 4 * 50)
    assert out["dhidden"][397:].any(dim=1).all() and not out["dhidden"][:397].any()
    assert out["dweight"].abs().max() > 1e-3


OPTIONS: list[dict[str, Any]] = [
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 3.0, "logit_scale": 2.0},
]


@implementations
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trl_6629_softcap_and_logit_scale(impl: str, options: dict[str, Any]) -> None:
    """Every way in honours them: the loss, the drop-in, the statistics and the head."""
    case = make_case(20, 50, 16, num_pairs=6)
    logits = case.hidden.double() @ case.weight.double().T * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    want = F.cross_entropy(logits, case.target).float()
    without = F.cross_entropy(case.hidden @ case.weight.T, case.target)
    assert (want - without).abs() > 0.01
    head = LossHead(16, 50, **options)
    head.weight.data = case.weight
    args = (case.hidden, case.weight, case.target)
    for got in (
        sftmix_loss(*args, case.lam, impl=impl, mixup_weight=0, **options).loss,
        sftmix_loss(*args, case.lam, impl=impl, **options).nll.mean(),
        linear_cross_entropy(*args, impl=impl, **options),
        -token_stats(*args, impl=impl, **options).logprob.mean(),
        head(case.hidden, case.target, impl=impl).loss,
        -head(case.hidden, case.target, stats=True, impl=impl).logprob.mean(),
    ):
        torch.testing.assert_close(got.detach(), want, rtol=2e-6, atol=0)


@implementations
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_quack_209_retained_graph(impl: str, reduction: str) -> None:
    """Three backwards through one graph give one gradient three times; its buffers are not scaled in place."""
    case = make_case(20, 50, 16, ignored=(4,))
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, case.target, reduction=reduction, impl=impl) * 3
    upstream = torch.linspace(1, 2, loss.numel()).reshape(loss.shape)
    results = [torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True) for _ in range(3)]
    for later in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], later, strict=True))


@implementations
def test_transformers_34191_tokens_not_steps(impl: str) -> None:
    """Two micro-batches of 5 and 31 supervised rows, divided by the 36 of the step: gradients of the one batch.

    Also transformers 35438 and 37766, torchtune 1917, nanochat 59 and 400. Means of means would weight the 5 rows six
    times too much.
    """
    batches = [
        make_case(20, 50, 16, num_pairs=2, ignored=tuple(range(5, 20)), seed=1),
        make_case(31, 50, 16, seed=2),
    ]
    weight = batches[0].weight
    total, summed = torch.zeros(50, 16), torch.zeros(())
    for case in batches:
        case.weight, case.options = weight, {"ntp_denominator": torch.tensor(36), "mixup_denominator": 2}
        out = run(case, impl=impl)
        total, summed = total + out["dweight"], summed + out["loss"]
    first, second = batches
    whole = Case(
        torch.cat([first.hidden, second.hidden]), weight, torch.cat([first.target, second.target]), first.lam
    )
    want = run(whole, impl="reference", dtype=F64)
    torch.testing.assert_close(summed.double(), want["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), want["dweight"], rtol=1e-5, atol=1e-7)


# --- Crashes -------------------------------------------------------------------------------------------------------


@served
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_liger_177_all_labels_ignored(impl: str, dtype: torch.dtype, reduction: str) -> None:
    """0, attached to the graph, with gradients of zeros: not NaN. Also torchtune 2341."""
    hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (6, 5))
    target = torch.full((6,), -100)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=impl)
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_trl_6859_an_empty_weight_is_named(impl: str) -> None:
    """What ZeRO-3 leaves of a parameter outside its forward: a refusal that names it, not an index error."""
    for empty in (torch.empty(0), torch.empty(0, 8)):
        with pytest.raises(ValueError, match=r"weight: expected .*\[V, D\]"):
            linear_cross_entropy(torch.randn(3, 8), empty, torch.tensor([0, 1, 2]), impl=impl)


@implementations
def test_liger_501_a_dtype_mismatch_outside_autocast_is_named(impl: str) -> None:
    """Also Liger 1283. Under autocast see test_autocast.py."""
    with pytest.raises(ValueError, match=r"weight: expected bfloat16 .* got float32"):
        linear_cross_entropy(
            torch.randn(3, 8).bfloat16(), torch.randn(5, 8), torch.tensor([0, 1, 2]), impl=impl
        )


@pytest.mark.parametrize("num_rows", [65_536, 70_001])
@pytest.mark.parametrize("num_pairs", [0, 30_000])
def test_liger_1294_no_grid_limit_at_65536_rows(
    num_rows: int, num_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launch stays under CUDA's 65,535 in the second and third dimension, at the tiles a GPU takes."""
    pytest.importorskip("triton")
    from sftmix_kernels.fused import configs, forward, recompute, stats, tiles
    from tests.kernels.fused_calls import forward_of

    grids: list[tuple[int, ...]] = []

    def recorded(grid: Any) -> Any:
        grids.append(grid)
        return lambda **_: None

    for module, name in (
        (forward, "_sftmix_fwd_kernel"), (stats, "_sftmix_fwd_combine_kernel"),
        (recompute, "_sftmix_recompute_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(
            module, name, type("Launcher", (), {"__getitem__": lambda self, g: recorded(g)})()
        )
    monkeypatch.setattr(tiles, "current_arch", lambda *_: "sm_90")
    monkeypatch.setattr(stats, "INTERPRETED", False)
    assert configs.choose_tile(
        "forward", num_rows=num_rows, vocab_size=64, hidden_size=4, dtype=F16, arch="sm_90", paired=False
    ).block_n <= 256  # fmt: skip
    hidden, weight = torch.zeros(num_rows, 4, dtype=F16), torch.zeros(64, 4, dtype=F16)
    forward_of(hidden, weight, torch.zeros(num_rows, dtype=torch.int64), torch.rand(num_pairs))
    assert len(grids) >= 2 and all(max(g[1:], default=1) <= 65_535 and g[0] < 2**31 for g in grids)
    # And the rows past 65,536 are computed, in the large tiles of the interpreter or by chunks.
    monkeypatch.undo()
    case = make_case(num_rows, 3, 2, num_pairs=num_pairs)
    loss = linear_cross_entropy(case.hidden, case.weight, case.target, impl="chunked", reduction="none")
    want = F.cross_entropy(case.hidden @ case.weight.T, case.target, reduction="none")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_liger_1316_no_out_dtype_where_the_library_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 16 bits into float32 in one call exists from compute capability 8.0 on: elsewhere, upcast."""
    pytest.importorskip("triton")
    from sftmix_kernels import fused

    products = pytest.importorskip(
        "sftmix_kernels.fused.products", reason=f"{fused.__name__} has no products"
    )
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    for capability, able in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert products.multiplies_into_float32(gpu) is able
    assert not products.multiplies_into_float32(torch.empty(0))
