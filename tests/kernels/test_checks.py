"""Bad input: one ValueError per argument, naming it, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels import LossHead, linear_cross_entropy, sftmix_loss, token_stats


def arguments(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Valid arguments for N = 6, V = 5, D = 4, M = 2, with some replaced."""
    good: dict[str, Any] = {
        "hidden": torch.randn(6, 4), "weight": torch.randn(5, 4), "target": torch.tensor([0, 1, 2, 3, 4, -100]),
        "lam": torch.tensor([0.2, 0.9]),
    }  # fmt: skip
    good.update(changes)
    return tuple(good.pop(k) for k in ("hidden", "weight", "target", "lam")), good


BAD: list[tuple[str, Any, str]] = [
    ("hidden", torch.randn(2, 3, 4), r"hidden: expected a floating tensor \[N, D\], got float32 \[2, 3, 4\]"),
    ("hidden", torch.ones(6, 4, dtype=torch.int64), "hidden: expected float32"),
    ("hidden", [[1.0]], "hidden: expected .* got list"),
    ("hidden", torch.randn(6, 4, device="meta"), "weight: expected a tensor on meta"),
    ("weight", torch.randn(5, 3), r"weight: expected float32 \[V=5, D=4\], got float32 \[5, 3\]"),
    ("weight", torch.randn(5, 4, dtype=torch.bfloat16), "weight: expected float32 .* got bfloat16"),
    ("weight", torch.randn(0, 4), "weight: .* V and D at least 1"),
    ("weight", torch.randn(5, 4, device="meta"), "weight: expected a tensor on cpu like hidden, got one on meta"),
    ("bias", torch.randn(6), r"bias: expected float32 \[V=5\], got float32 \[6\]"),
    ("bias", torch.randn(5).double(), r"bias: expected float32 \[V=5\], got float64"),
    ("bias", torch.randn(5, device="meta"), "bias: expected a tensor on cpu"),
    ("target", torch.zeros(5, dtype=torch.int64), r"target: expected int64 \[N=6\], got int64 \[5\]"),
    ("target", torch.zeros(6, dtype=torch.int32), r"target: expected int64 \[N=6\], got int32 \[6\]"),
    ("target", torch.zeros(6, dtype=torch.int64, device="meta"), "target: expected a tensor on cpu"),
    ("target", torch.tensor([0, 1, 5, 3, 4, -100]), r"target: expected class indices in \[0, V=5\).* got 5 at row 2"),
    ("target", torch.tensor([0, 1, -1, 3, 4, -100]), r"target: .* ignore_index=-100, got -1 at row 2"),
    ("lam", torch.tensor([[0.5]]), r"lam: expected float32 or float64 \[M\]"),
    ("lam", torch.tensor([0.5], dtype=torch.bfloat16), "lam: .*16 bits round it.*cast_forward_inputs=False.* got bf"),
    ("lam", torch.tensor([0.5] * 4), r"lam: expected \[M\] with 2M at most N=6"),
    ("lam", torch.tensor([0.5, 1.5]), r"lam: expected values in \[0, 1\], got 1.5 at pair 1"),
    ("lam", torch.tensor([float("nan"), 0.5]), r"lam: expected values in \[0, 1\], got nan at pair 0"),
    ("lam", torch.tensor([-0.1, 0.5]), r"lam: expected values in \[0, 1\], got -0.1"),
    ("lam", torch.tensor([0.5, 0.5], requires_grad=True), "lam: expected a tensor that requires no gradient"),
    ("lam", torch.tensor([0.5, 0.5], device="meta"), "lam: expected a tensor on cpu"),
    ("row_weight", torch.ones(5), r"row_weight: expected .* \[N=6\], got float32 \[5\]"),
    ("row_weight", torch.ones(6).half(), "row_weight: expected float32, .*16 bits round it.* got float16"),
    ("row_weight", torch.ones(6, dtype=torch.complex64), "row_weight: expected float32"),
    ("class_weight", torch.ones(6), r"class_weight: expected .* \[V=5\], got float32 \[6\]"),
    ("class_weight", -torch.ones(5), "class_weight: expected finite values >= 0, got -1"),
    ("token_scaling", 1, "token_scaling: expected True or False, got int 1"),
    ("row_weight", torch.tensor([1.0, 1, 1, 1, 1, float("inf")]), "row_weight: expected finite values, got inf"),
    ("row_weight", torch.ones(6, requires_grad=True), "row_weight: .* requires no gradient"),
    ("row_weight", torch.ones(6, device="meta"), "row_weight: expected a tensor on cpu"),
    ("pair_weight", torch.ones(3), r"pair_weight: expected .* \[M=2\], got float32 \[3\]"),
    ("pair_weight", torch.tensor([float("nan"), 1.0]), "pair_weight: expected finite values, got nan"),
    ("mixup_weight", -0.1, "mixup_weight: expected a finite number >= 0, got float -0.1"),
    ("mixup_weight", float("nan"), "mixup_weight: expected a finite number"),
    ("mixup_weight", "0.2", "mixup_weight: expected a number"),
    ("mixup_weight", torch.tensor([0.2]), "mixup_weight: .* 0-d tensor"),
    ("mixup_weight", torch.tensor(0.2, requires_grad=True), "mixup_weight: .* requires no gradient"),
    ("ntp_denominator", 0, "ntp_denominator: expected a value > 0 where there is something to divide, got 0"),
    ("ntp_denominator", torch.tensor(3.0).half(), "ntp_denominator: .*16 bits round it"),
    ("ntp_denominator", torch.tensor(0), "ntp_denominator: expected a value > 0 where there is something"),
    ("mixup_denominator", float("inf"), "mixup_denominator: expected a finite number >= 0"),
    ("ignore_index", 1.5, "ignore_index: expected an int, got float"),
    ("softcap", 0.0, "softcap: expected a finite number > 0"),
    ("softcap", torch.tensor([3.0]), "softcap: expected a finite number > 0"),
    ("logit_scale", -1.0, "logit_scale: expected a finite number > 0"),
    ("label_smoothing", 1.1, r"label_smoothing: expected a number in \[0, 1\], got float 1.1"),
    ("label_smoothing", torch.tensor([0.1]), r"label_smoothing: expected a number in \[0, 1\]"),
    ("z_loss", -1e-4, "z_loss: expected a finite number >= 0, got float -0.0001"),
    ("z_loss", torch.tensor([0.1]), "z_loss: expected a finite number >= 0, got float32"),
    ("impl", "triton", "impl: expected one of reference, chunked, fused or None, got 'triton'"),
    ("scratch_bytes", 0, "scratch_bytes: expected an int > 0 or None, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("name,value,message", BAD, ids=[f"{i}-{n}" for i, (n, _, _) in enumerate(BAD)])
def test_bad_argument_is_named(name: str, value: Any, message: str) -> None:
    positional, options = arguments(**{name: value})
    with pytest.raises(ValueError, match=message):
        sftmix_loss(*positional, **options)


def test_the_good_arguments_are_good() -> None:
    positional, options = arguments()
    assert sftmix_loss(*positional, **options).loss.isfinite()


def test_the_other_entry_points_check_too() -> None:
    (hidden, weight, target, lam), _ = arguments()
    with pytest.raises(ValueError, match="reduction: expected 'mean', 'sum' or 'none', got 'median'"):
        linear_cross_entropy(hidden, weight, target, reduction="median")
    with pytest.raises(ValueError, match="target: expected int64"):
        linear_cross_entropy(hidden.view(2, 3, 4), weight, target)
    with pytest.raises(ValueError, match=r"target: .* got 9 at row 0"):
        token_stats(hidden, weight, target + 9)
    head = LossHead(4, 5)
    with pytest.raises(ValueError, match="target: expected int64"):
        head(hidden, lam=lam)
    with pytest.raises(ValueError, match=r"lam: expected None with stats=True"):
        head(hidden, target, lam, stats=True)
    with pytest.raises(ValueError, match=r"linear: expected an nn.Linear"):
        LossHead.from_linear(torch.nn.Identity())  # type: ignore[arg-type]


def test_named_impl_that_cannot_serve_is_refused() -> None:
    (hidden, weight, target, lam), _ = arguments()
    with pytest.raises(ValueError, match=r"impl: .* got 'fused': its kernels have no float64"):
        sftmix_loss(hidden.double(), weight.double(), target, lam, impl="fused")


def test_fused_on_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftmix_kernels import choice

    monkeypatch.setattr(choice, "_INTERPRETING", False)
    positional, options = arguments(impl="fused")
    with pytest.raises(ValueError, match=r"impl: .* TRITON_INTERPRET=1"):
        sftmix_loss(*positional, **options)


def test_under_compile_bad_values_are_device_assertions() -> None:
    """No host read: the check is torch._assert_async in the graph, which on a CPU raises when it runs."""
    (hidden, weight, target, lam), _ = arguments()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t, s: sftmix_loss(hidden, weight, t, s).loss, fullgraph=True, backend="aot_eager"
    )
    assert compiled(target, lam).isfinite()
    with pytest.raises(RuntimeError, match="target: expected class indices"):
        compiled(target + 7, lam)
    with pytest.raises(RuntimeError, match="lam: expected values in"):
        compiled(target, lam + 1)


def test_a_dtensor_weight_is_refused_and_the_head_named(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        (hidden, weight, target, lam), _ = arguments()
        sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"weight: expected a local tensor; .*LossHead.*got a DTensor"):
            sftmix_loss(hidden, sharded, target, lam)
    finally:
        dist.destroy_process_group()
