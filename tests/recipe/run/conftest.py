"""What the tests of the stages share: a tiny model with its data, and a finished run folder that nobody changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.recipe import tiny
from tests.recipe.run.small import run


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model on disk and 30 conversations in its words."""
    folder = tmp_path_factory.mktemp("material")
    tiny.causal_lm().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 50, (count,), generator=draw))

    rows = [{"prompt": words(3), "completion": words(2 + n % 7)} for n in range(30)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def finished(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(material, folder)
    return folder
