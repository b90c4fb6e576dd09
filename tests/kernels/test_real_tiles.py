"""bfloat16 at the tiles that each chip's kernels are compiled with, in the interpreter: ragged edges of real blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels import token_stats
from tests.parity import assert_parity, assert_within_contract, make_case

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled where there is a GPU: tests/gpu", allow_module_level=True)

from sftmix_kernels.fused import Tile, configs, forward, recompute, stats, tiles

BF16 = torch.bfloat16
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# N, V, D, M, options, and why. D = 72: rows that descriptors can address, a tail of 8 after a block of 64 or 32.
CASES: list[tuple[int, int, int, int, dict[str, Any], str]] = [
    (270, 261, 72, 131, {}, "pairs and rows, each a few past a block"),
    (267, 261, 72, 129, {"bias": True, "label_smoothing": 0.1, "ignored": (3, 130)}, "bias, smoothing, ignored rows"),
    (265, 389, 72, 70, {"softcap": 5.0, "z_loss": 1e-3, "logit_scale": 0.7}, "softcap and z-loss"),
    (259, 257, 77, 128, {"bias": True}, "an odd D: pointers"),
]  # fmt: skip


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, Tile, bool]]:
    """Operation, whether paired, tile and whether by descriptors of every launch that took a chip's tile."""
    found: list[tuple[str, bool, Tile, bool]] = []
    arguments = tiles.launch_arguments

    def seen(operation: str) -> Any:
        def kept(problem: Any, part: Any, tile: Tile) -> dict[str, Any]:
            launch = arguments(problem, part, tile)
            found.append((operation, part.paired, tile, launch["USE_DESCRIPTORS"]))
            return launch

        return kept

    monkeypatch.setattr(forward, "launch_arguments", seen("forward"))
    monkeypatch.setattr(recompute, "launch_arguments", seen("recompute"))
    monkeypatch.setattr(stats, "INTERPRETED", False)  # the folding kernel's own block too
    return found


@pytest.mark.parametrize("shape", CASES, ids=[c[5] for c in CASES])
@pytest.mark.parametrize("arch", ARCHS)
def test_parity_at_the_tiles_of(
    arch: str,
    shape: tuple[Any, ...],
    used: list[tuple[str, bool, Tile, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "current_arch", lambda _: arch)
    monkeypatch.setattr(forward, "choose_num_splits", lambda *_: 2)
    num_rows, vocab_size, width, num_pairs, options, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=BF16, **options)
    assert_parity(case, impl="fused", schedule="recompute", scratch_bytes=1)
    assert {(operation, paired) for operation, paired, *_ in used} == {
        (operation, paired) for operation in configs.OPERATIONS for paired in (True, False)
    }
    for operation, paired, tile, by_descriptors in used:
        expected = configs.choose_tile(
            operation, num_rows=num_pairs, vocab_size=vocab_size, hidden_size=width, dtype=BF16, arch=arch,
            paired=paired, softcap="softcap" in options, bias="bias" in options,
        )  # fmt: skip
        assert tile == expected and by_descriptors == (tile.use_descriptors and width == 72)
        assert vocab_size % tile.block_v and width % tile.block_d


@pytest.mark.parametrize("arch", ARCHS)
def test_statistics_at_the_tiles_of(
    arch: str, used: list[tuple[str, bool, Tile, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "current_arch", lambda _: arch)
    case = make_case(133, 261, 72, dtype=BF16, bias=True, softcap=5.0)
    assert case.bias is not None
    tensors = (case.hidden, case.weight, case.bias)
    results = []
    for impl, dtype in (("fused", BF16), ("reference", BF16), ("reference", torch.float64)):
        hidden, weight, bias = (t.to(dtype) for t in tensors)
        results.append(token_stats(hidden, weight, case.target, bias=bias, softcap=5.0, impl=impl))
    for name in ("logprob", "lse", "entropy"):
        assert_within_contract(name, *(getattr(each, name) for each in results))
    assert [(operation, paired) for operation, paired, *_ in used] == [("forward", False)]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("num_pairs", [4, 0], ids=["pairs", "rows"])
def test_the_stored_schedule_at_its_own_block(
    monkeypatch: pytest.MonkeyPatch, num_pairs: int, arch: str
) -> None:
    """Blocks of a chip's own size, the last with 3 columns."""
    monkeypatch.setattr(tiles, "current_arch", lambda _: arch)
    case = make_case(9, 4099, 24, num_pairs=num_pairs, dtype=BF16, bias=True, softcap=5.0, z_loss=1e-3)
    assert configs.choose_row_block(4099, arch) == {"sm_90": 2048, "gfx942": 4096}[arch]
    assert_parity(case, impl="fused", schedule="stored", orders=4)
