"""Offsets past 2^31 in the scratch of dlogits, N·V_s elements (recompute) or chunk rows times width (stored).

The scratch is laid out by strides, in address space of which only the touched pages exist; test_shapes_edge.py does
the same with weight and hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import bounds
from tests.kernels.test_shapes_edge import far_apart
from tests.parity import make_case, run

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled where there is a GPU: tests/gpu", allow_module_level=True)

STRIDE = 2**30 + 16  # two rows fit into 32 bits, three do not; stored needs a multiple of 16
WIDTH = 24  # of hidden and weight


@pytest.fixture
def far_scratch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What ``hidden.new_empty(rows, columns)`` makes gets rows ``STRIDE`` apart, and is listed; gradients do not."""
    made: list[Tensor] = []
    new_empty = Tensor.new_empty

    def apart(self: Tensor, *size: Any, **options: Any) -> Tensor:
        plain = new_empty(self, *size, **options)
        if plain.ndim != 2 or plain.dtype != torch.float16 or plain.shape[1] == WIDTH:
            return plain
        made.append(far_apart(plain, STRIDE))
        return made[-1]

    monkeypatch.setattr(Tensor, "new_empty", apart)
    return made


@pytest.mark.parametrize("num_pairs", [4, 0], ids=["pairs", "rows"])
@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_apple_37_dlogits_offsets_past_2_31(
    schedule: str, num_pairs: int, far_scratch: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of a scratch that lies close together; a wrapped offset reads and writes elsewhere."""
    if schedule == "stored":  # takes the distance of rows for their padded width, and writes into the padding
        monkeypatch.setattr(bounds, "outside", lambda tensor, addresses: addresses[:0])
    case = make_case(8, 40, WIDTH, num_pairs=num_pairs, dtype=torch.float16)
    far = run(case, impl="fused", schedule=schedule, scratch_bytes=4 * 48 * 2)
    rows = 8 if schedule == "recompute" else 4
    assert far_scratch and all(t.shape[0] == rows and t.stride() == (STRIDE, 1) for t in far_scratch)
    assert (rows - 1) * STRIDE > 2**31
    monkeypatch.undo()
    near = run(case, impl="fused", schedule=schedule, scratch_bytes=4 * 48 * 2)
    for name, value in far.items():
        assert torch.equal(value, near[name]), name
