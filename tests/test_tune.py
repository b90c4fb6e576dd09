"""The tile tuner's rehearsal: every candidate runs, and what it prints can stand in configs.py."""

from __future__ import annotations

import json
from pathlib import Path
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
    for family, kernels in configs._TILES_16BIT.items():
        for (operation, paired), tile in kernels.items():
            hopper = family == "sm_90"
            assert tile in tune.candidates(operation, paired, bulk=True, hopper=hopper), tile


KERNELS = [(operation, paired) for operation in configs.OPERATIONS for paired in (True, False)]


@pytest.mark.parametrize(("operation", "paired"), KERNELS)
def test_every_candidate_has_been_compiled_and_misfits_are_left_out(operation: str, paired: bool) -> None:
    """No spills, no serialised or missing wgmma, shared memory that fits in what is timed on sm_90; bulk copies."""
    lines = {
        line["tile"]: line
        for line in json.loads(tune.COMPILED.read_text(encoding="utf-8"))["tiles"]
        if (line["operation"], line["paired"]) == (operation, paired)
    }
    every = list(tune.sizes_of(paired, bulk=True))
    assert set(lines) == {tune.source(tile) for tile in every}, (
        "run `python -m tests.kernels.aot --candidates`"
    )
    left = tune.candidates(operation, paired, bulk=True, hopper=True)
    assert len(every) == len(left) + len(tune.misfits(operation, paired))
    assert any(tile.use_descriptors for tile in left)
    for tile in left:
        line = lines[tune.source(tile)]
        assert line["stack"] <= 64 and not line["notes"] and line["shared"] <= 227 * 1024
        assert line["counts"]["wgmma"] > 0 and line["registers"] <= 255
        assert (line["counts"]["bulk loads"] > 0) == tile.use_descriptors


def test_each_reason_leaves_a_tile_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {
        "operation": "forward",
        "paired": True,
        "stack": 0,
        "notes": [],
        "shared": 0,
        "counts": {"wgmma": 4},
    }
    bad = {"spills": {"stack": 72}, "serial": {"notes": ["C7511"]}, "slow": {"counts": {"wgmma": 0}},
           "large": {"shared": 2**18}}  # fmt: skip
    tiles = [{**good, "tile": "good"}, *({**good, "tile": name, **change} for name, change in bad.items())]
    (tmp_path / "tiles.json").write_text(json.dumps({"tiles": tiles}))
    monkeypatch.setattr(tune, "COMPILED", tmp_path / "tiles.json")
    assert set(tune.misfits("forward", True)) == set(bad)
    assert not tune.misfits("recompute", True) and not tune.misfits("forward", False)


def test_a_tile_is_printed_as_it_is_written() -> None:
    for tile in tune.sizes_of(True, bulk=True):
        assert eval(tune.source(tile), {"Tile": Tile, "_BULK": configs._BULK}) == tile


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_would_work(capsys: Any) -> None:
    assert tune.main([]) == 2
    assert "--rehearse" in capsys.readouterr().err
