"""A model that processes share is never whole in one of them but as pages of its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from bench.load import write_model
from tests.once import made_once

ROOT = Path(__file__).resolve().parents[3]
PROCESSES = 4
SIZES = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    def launch(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(write_model.__globals__["SIZES"], "between", SIZES)
            write_model(out / "model", "between", "bfloat16")
        write_model(out / "warm", "tiny", "bfloat16")
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m",
             "tests.recipe.model.loading_ranks", str(out / "model"), str(out / "warm"), str(out)],
            # What is freed goes back at once, so that the process's memory is what it holds.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]

    folder = made_once(tmp_path_factory, "sharded_loading", launch)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_no_process_holds_the_model(told: list[dict[str, int]]) -> None:
    """Its float32 shard, and meanwhile the largest unit whole; a full copy alone would be 4 bytes a number."""
    assert LlamaConfig(**SIZES).num_hidden_layers == 16
    block = 4 * SIZES["hidden_size"] ** 2 + 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    embedding = SIZES["vocab_size"] * SIZES["hidden_size"]
    for each in told:
        whole = 4 * each["numbers"]
        assert each["held"] <= 1.01 * whole / PROCESSES
        assert each["peak"] <= each["held"] + 4 * 2 * max(block, embedding), each
        assert each["peak"] < 0.4 * whole, each
