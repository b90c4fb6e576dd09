"""The doctor's check of the loss: right code passes, faults are found, and its bound is that of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sftmix_kernels.doctor import examine as doctor
from sftmix_kernels.doctor import self_check
from sftmix_kernels.doctor.self_check import FULL, PLAIN, Way
from tests.parity import assert_draws_within_contract

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_is_right(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check = self_check.check_way(Way("chunked"), dtype, "cpu", options)
    assert check.is_right, check
    assert check.share > 0.1, check  # the bound is near the errors: a fault cannot hide under it


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Problems that Triton's interpreter does in seconds."""
    for name, size in {"PAIRS": 9, "ROWS": 24, "VOCAB": 131, "WIDTH": 32}.items():
        monkeypatch.setattr(self_check, name, size)
    self_check._expected.cache_clear()
    yield
    self_check._expected.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_fused_is_right(smaller: None, schedule: str, dtype: torch.dtype) -> None:
    for options in (PLAIN, FULL):
        check = self_check.check_way(Way("fused", schedule), dtype, doctor.current_device(), options)
        assert check.is_right and check.share > 0.1, check


# Each with the data types in which it must be found: a small one drowns in 16-bit roundings.
FAULTS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "loss": (1, lambda out: out._replace(loss=out.loss * 1.0001)),
    "nll": (1, lambda out: out._replace(nll=out.nll + 1e-4)),
    "lse": (3, lambda out: out._replace(lse=out.lse.roll(1))),
    "mixup_nll": (3, lambda out: out._replace(mixup_nll=out.mixup_nll.flip(0))),
    "NaN": (3, lambda out: out._replace(lse=torch.full_like(out.lse, float("nan")))),
    "shape": (3, lambda out: out._replace(nll=out.nll[1:])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_with_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, says: Any, fault: str) -> None:
    right, (least, spoil) = self_check.sftmix_loss, FAULTS[fault]

    def broken(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return spoil(out) if options["impl"] == "chunked" else out

    monkeypatch.setattr(self_check, "sftmix_loss", broken)
    code, text = says(doctor.parity_findings(CPU))
    assert code == 1 and text.count("! parity") >= least
    assert "! parity float32: chunked" in text


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("factor", [1.001, 0.0, -1.0])
def test_a_gradient_with_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    right = self_check.sftmix_loss

    def broken(hidden: Any, weight: Any, *args: Any, bias: Any, impl: str, **options: Any) -> Any:
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        if impl == "chunked":
            leaves[name].register_hook(lambda gradient: gradient * factor)
        return right(*[leaves["hidden"], leaves["weight"]], *args, bias=bias, impl=impl, **options)

    monkeypatch.setattr(self_check, "sftmix_loss", broken)
    check = self_check.check_way(Way("chunked"), torch.float32, "cpu", FULL)
    assert not check.is_right and check.result == f"d{name}"


def test_a_fault_deep_in_the_kernels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs' shares exchanged where both implementations' operators take them."""
    from sftmix_kernels import functional

    right = functional.run
    monkeypatch.setattr(functional, "run", lambda call, made: right(call._replace(lam=1 - call.lam), made))
    for dtype in DTYPES:
        assert not self_check.check_way(Way("chunked"), dtype, "cpu", PLAIN).is_right


def test_a_loss_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    right = self_check.sftmix_loss

    def broken(*args: Any, **options: Any) -> Any:
        if options["impl"] != "reference":
            raise RuntimeError("PassManager::run failed\nlong text")
        return right(*args, **options)

    monkeypatch.setattr(self_check, "sftmix_loss", broken)
    code, text = says(doctor.parity_findings(CPU))
    assert code == 1
    assert "float32: chunked fails: RuntimeError: PassManager::run failed -> mend" in text


def test_cases_that_the_time_does_not_reach_are_said(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(self_check, "check_loss", lambda ways, device: iter(()))
    code, text = says(doctor.parity_findings(CPU))
    assert code == 0 and "bfloat16: chunked not reached in 10 s" in text


def test_no_case_begins_when_the_time_is_over() -> None:
    assert list(self_check.check_loss({torch.float32: [Way("chunked")]}, "cpu", seconds=0)) == []


@pytest.mark.parametrize("scale", [0.3, 0.9, 1.1, 3.0])
def test_the_bound_is_that_of_the_tests(scale: float) -> None:
    """The doctor's share is above 1 exactly where tests/parity.py refuses."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        draws = []
        for _ in range(3):
            truth = torch.randn(50, generator=g, dtype=torch.float64)
            error = 1e-3 * torch.randn(50, generator=g, dtype=torch.float64)
            ours = truth + 2 * scale * 1e-3 * torch.randn(50, generator=g, dtype=torch.float64)
            draws.append((ours.float(), (truth + error).float(), truth))
        sizes = [self_check._sizes(ours, torchs.double() - truth, truth) for ours, torchs, truth in draws]
        share = self_check._share(torch.stack(sizes), torch.finfo(torch.float32).eps)
        try:
            assert_draws_within_contract("x", draws)
        except AssertionError:
            assert share > 1
        else:
            assert share <= 1
        if scale in (0.3, 3.0):
            assert (share > 1) == (scale == 3.0)
