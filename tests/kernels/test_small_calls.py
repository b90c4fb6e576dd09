"""Small calls of the portable loss: blocks and chunks as large as they may be, few steps, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from sftmix_kernels.chunked.scratch import CACHE_BYTES, WHOLE_BYTES, Sizes, choose_sizes, choose_tile
from tests.kernels.watching import Bodies
from tests.parity import assert_parity, make_case

F32, BF16 = torch.float32, torch.bfloat16


def sizes(
    num_rows: int, num_pairs: int, vocab_size: int, dtype: torch.dtype = F32, scratch: int = 64 * 2**20
) -> Sizes:
    return choose_sizes(
        num_rows, num_pairs, vocab_size, dtype=dtype, wide_dtype=F32, device="cpu", scratch_bytes=scratch
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_blocks_of_unpaired_rows_do_not_depend_on_pairs(dtype: torch.dtype) -> None:
    """They were clipped by the number of pairs, 0, to three rows."""
    alone, beside = sizes(1024, 0, 4096, dtype), sizes(1024 + 2, 1, 4096, dtype)
    assert alone.block_singles == 512 or alone.block_singles * 4096 * 4 > CACHE_BYTES // 2
    assert beside.block_singles >= 0.9 * alone.block_singles
    assert sizes(1024, 0, 49152, dtype).block_singles == 3 * (CACHE_BYTES // (3 * 49152 * 4))


@pytest.mark.parametrize("num_rows,vocab_size", [(1, 16), (8, 16), (15, 4096), (1, 65536)])
def test_what_is_small_is_one_chunk(num_rows: int, vocab_size: int) -> None:
    assert num_rows * vocab_size * 4 <= WHOLE_BYTES
    assert sizes(num_rows, 0, vocab_size).singles == num_rows
    assert sizes(2 * num_rows, num_rows, vocab_size // 2).pairs == num_rows


def test_what_is_not_small_is_never_one_chunk_and_a_bound_is_kept() -> None:
    assert sizes(128, 0, 4096, scratch=2**40).singles == 64
    assert sizes(128, 64, 4096, scratch=2**40).pairs == 32
    assert sizes(8, 0, 4096, scratch=4 * 4096 * 3).singles <= 3  # small, and bounded all the same


@pytest.mark.parametrize("count", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("vocab_size", [1, 100, 49152, 256000])
def test_a_tile_stays_within_its_bound(count: int, vocab_size: int) -> None:
    for scratch in (1, 10**4, 10**6, 64 * 2**20):
        rows, columns = choose_tile(
            count, vocab_size, cell_bytes=12, most_columns=4096, device="cpu", scratch_bytes=scratch
        )
        assert 1 <= rows <= count and 1 <= columns <= min(vocab_size, 4096)
        assert 12 * rows * columns <= max(min(scratch, CACHE_BYTES), 12)


@pytest.mark.parametrize("num_rows,num_pairs", [(1, 0), (2, 1), (8, 4), (9, 4)])
def test_the_contract_holds(num_rows: int, num_pairs: int) -> None:
    assert_parity(make_case(num_rows, 16, 8, num_pairs=num_pairs), impl="chunked", orders=8)


def steps(call: Callable[[], object]) -> int:
    """Tensor operations of a call, inside the operators too: what a small call's time consists of."""
    with Bodies() as seen:
        call()
    return len(seen.called)


def test_the_number_of_steps_is_held() -> None:
    """At N = 8, V = 16 a call is all overhead; twice as many steps stood here before both members shared theirs."""
    case = make_case(8, 16, 4, num_pairs=4)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    ntp = steps(lambda: linear_cross_entropy(hidden, weight, case.target, impl="chunked"))
    pairs = steps(lambda: sftmix_loss(hidden, weight, case.target, case.lam, impl="chunked"))
    stats = steps(lambda: token_stats(hidden, weight, case.target, impl="chunked"))
    assert stats < ntp < pairs < 260 and ntp < 170 and stats < 125
