"""What is in memory during the loss: on the CPU by watching every tensor that is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix_kernels.chunked import Needs, chunked_loss
from sftmix_kernels.rows import Head
from tests.parity import make_case


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest storage any operator returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return out


@pytest.mark.parametrize("num_pairs", [0, 100, 128])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_holds_no_more_logits_than_its_scratch(
    num_pairs: int, softcap: float, dtype: torch.dtype
) -> None:
    num_rows, vocab_size, scratch_bytes = 256, 600, 600 * 4 * 24
    case = make_case(num_rows, vocab_size, 8, num_pairs=num_pairs, dtype=dtype)
    coefs = torch.ones(num_rows), torch.ones(num_pairs)
    with LargestTensor() as seen:
        chunked_loss(
            case.hidden, Head(case.weight, softcap=softcap), case.target, case.lam, row_coef=coefs[0],
            pair_coef=coefs[1], needs=Needs(True, True), scratch_bytes=scratch_bytes,
        )  # fmt: skip
    assert scratch_bytes // 3 <= seen.nbytes <= scratch_bytes


@pytest.mark.parametrize("num_pairs", [0, 8])
def test_chunked_never_holds_the_logits_of_all_rows_even_when_they_fit(num_pairs: int) -> None:
    num_rows, vocab_size = 16, 700
    case = make_case(num_rows, vocab_size, 8, num_pairs=num_pairs)
    with LargestTensor() as seen:
        chunked_loss(
            case.hidden, Head(case.weight), case.target, case.lam, row_coef=torch.ones(num_rows),
            pair_coef=torch.ones(num_pairs), needs=Needs(True, True), scratch_bytes=2**30,
        )  # fmt: skip
    assert seen.nbytes < num_rows * vocab_size * 4
