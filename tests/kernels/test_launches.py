"""What a call of ``fused`` launches beside its products, counted on tensors without memory: bench/host.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import host
from bench.trace import PRODUCTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_pairs", [1, 0], ids=["pairs", "next-token"])
@pytest.mark.parametrize("schedule,products", [("recompute", 2), ("stored", 3)])
def test_at_most_twenty_launches_beside_the_products(
    schedule: str, products: int, num_pairs: int, dtype: torch.dtype
) -> None:
    """One chunk or one slice, forward and backward; 144 and 100 stood here with pairs before rows had their kernels."""
    names = host.launches(schedule, num_pairs, dtype)
    beside = [name for name in names if name not in PRODUCTS]
    # The products of a pair's two runs of rows with the weight are two.
    assert len(names) - len(beside) == products + (num_pairs if schedule == "stored" else 0)
    assert sum(name.startswith("_sftmix") for name in beside) == (7 if schedule == "recompute" else 6)
    assert "_sftmix_prepare_kernel" in names and "_assert_async" in names
    assert len(beside) <= 20, beside
