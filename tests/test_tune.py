"""The tile tuner's rehearsal: every candidate runs, and what it prints can stand in configs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from bench import tune
from sftmix_kernels.fused import Tile, configs


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_rehearsal_times_every_candidate_and_prints_rows_of_the_table(capsys: Any) -> None:
    assert tune.main(["--rehearse", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# ") and "triton" in lines[0]
    rows = [line for line in lines if not line.startswith("#")]
    assert len(rows) == 4 and not any("failed" in line for line in lines)
    timed = [line for line in lines if line.startswith("#  ")]
    assert len(timed) == 4 * 2 * len(tune.TOY_SIZES)
    table = eval("{" + "\n".join(rows) + "\n}", {"Tile": Tile, "_BULK": configs._BULK})
    assert {(operation, paired) for operation in configs.OPERATIONS for paired in (True, False)} == set(table)
    assert all(isinstance(tile, Tile) for tile in table.values())


def test_the_candidates_hold_the_table_of_today() -> None:
    """What configs.py uses is always measured against the others."""
    for kernels in configs._TILES_16BIT.values():
        for (_, paired), tile in kernels.items():
            assert tile in set(tune.candidates(paired, toy=False, bulk=True)), tile


def test_a_tile_is_printed_as_it_is_written() -> None:
    for tile in tune.candidates(True, toy=False, bulk=True):
        assert eval(tune.source(tile), {"Tile": Tile, "_BULK": configs._BULK}) == tile


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_would_work(capsys: Any) -> None:
    assert tune.main([]) == 2
    assert "--rehearse" in capsys.readouterr().err
