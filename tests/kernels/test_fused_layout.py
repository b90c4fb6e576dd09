"""The kernels whatever the layout of their inputs, and which tile, slice and split a size takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parity import Case, make_case

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled where there is a GPU: tests/gpu", allow_module_level=True)

from sftmix_kernels.fused import Tile, configs
from tests.kernels.fused_calls import backward_of, forward_of
from tests.kernels.test_fused_kernels import DESCRIPTORS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def strided(kind: str, case: Case) -> Case:
    """The same numbers in another layout; descriptors cannot address the last two."""
    hidden, weight = case.hidden, case.weight
    if kind == "padded rows":
        hidden, weight = (torch.nn.functional.pad(t, (0, 8))[:, : t.shape[1]] for t in (hidden, weight))
    elif kind == "transposed":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    elif kind == "base off by one":
        hidden, weight = (
            torch.nn.functional.pad(t.flatten(), (1, 0))[1:].view_as(t) for t in (hidden, weight)
        )
    elif kind == "odd row stride":
        hidden, weight = (torch.nn.functional.pad(t, (0, 1))[:, : t.shape[1]] for t in (hidden, weight))
    return Case(hidden, weight, case.target.repeat_interleave(2)[::2], case.lam.repeat_interleave(2)[::2])


@pytest.mark.parametrize("kind", ["padded rows", "transposed", "base off by one", "odd row stride"])
def test_layout_changes_nothing(kind: str) -> None:
    case = make_case(40, 70, 40, num_pairs=16)
    results = []
    for c in (case, strided(kind, case)):
        arguments = (c.hidden, c.weight, c.target, c.lam)
        stats = forward_of(*arguments, tile=DESCRIPTORS, num_splits=2)
        coefs = (torch.ones(40), torch.ones(16), stats.row_carry, stats.pair_carry)
        gradients = backward_of(*arguments, *coefs, tile=DESCRIPTORS, scratch_bytes=1)
        results.append((*stats, *gradients[:2]))
        assert all(g.is_contiguous() for g in gradients)
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_rows_that_share_memory() -> None:
    """An expanded hidden (row stride 0) with the descriptors' tile."""
    case = make_case(1, 70, 40)
    target, lam = torch.arange(20), torch.rand(8)
    shared, copied = (
        forward_of(hidden, case.weight, target, lam, tile=DESCRIPTORS)
        for hidden in (case.hidden.expand(20, 40), case.hidden.repeat(20, 1))
    )
    assert all(torch.equal(left, right) for left, right in zip(shared, copied, strict=True))


def test_offsets_past_two_to_the_31() -> None:
    """Rows 2^30 elements apart, in memory of which only the rows are ever touched; 32 bits would wrap at row 2."""

    def spread(rows: Tensor) -> Tensor:
        far = torch.from_numpy(np.empty(2 * 2**30 + rows.shape[1], dtype=np.float16))
        far = far.as_strided(rows.shape, (2**30, 1))
        return far.copy_(rows)

    case = make_case(3, 3, 16, dtype=F16)
    results = []
    for hidden, weight in ((case.hidden, case.weight), (spread(case.hidden), spread(case.weight))):
        stats = forward_of(hidden, weight, case.target, case.lam)
        coefs = (torch.ones(3), torch.empty(0), stats.row_carry, stats.pair_carry)
        gradients = backward_of(hidden, weight, case.target, case.lam, *coefs)
        results.append((*stats, *gradients))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def choose(operation: str = "forward", arch: str = "sm_90", dtype: torch.dtype = F16, **changes: Any) -> Tile:
    sizes = {"num_rows": 4096, "vocab_size": 128256, "hidden_size": 4096, "paired": True, **changes}
    return configs.choose_tile(operation, arch=arch, dtype=dtype, **sizes)


def test_tiles_are_chosen_by_arch_dtype_and_softcap() -> None:
    assert choose().use_descriptors and not choose(arch="sm_80").use_descriptors
    assert choose(arch="gfx950") == choose(arch="gfx942") and not choose(arch="gfx942").use_descriptors
    assert choose(arch="sm_103") == choose(arch="sm_100")
    assert choose(arch="sm_89") == choose(arch="sm_120") == choose(arch="sm_80")
    assert choose(dtype=F32) == choose(dtype=F32, arch="sm_80") != choose()
    assert choose("recompute", softcap=True) != choose("recompute") and choose(softcap=True) == choose()
    assert configs.current_arch() == "interpreter"
    for bad in ({"operation": "sideways"}, {"arch": "cpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
            choose(**bad)


@pytest.mark.parametrize("num_rows", [1, 100, 8192, 3_000_000])
@pytest.mark.parametrize("vocab_size", [1, 128, 129, 50257, 128256])
def test_slices_and_splits_cover_the_vocabulary(num_rows: int, vocab_size: int) -> None:
    num_tiles = -(-vocab_size // 128)
    for scratch_bytes in (None, 1, 2**20, 2**30, 2**60):
        width = configs.choose_slice_width(num_rows, vocab_size, 2, block_v=128, scratch_bytes=scratch_bytes)
        assert width % 128 == 0 and 0 < width < vocab_size + 128
        if scratch_bytes is None:
            assert width < vocab_size or num_tiles == 1
        else:
            assert width * num_rows * 2 <= scratch_bytes or width == 128
    num_splits = configs.choose_num_splits(-(-num_rows // 64), num_tiles, 264)
    assert 1 <= num_splits <= num_tiles
    assert num_rows > 64 or num_tiles < 264 or num_splits > 132  # few rows: the vocabulary fills the chip
