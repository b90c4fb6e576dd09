"""A tiny model and data on disk, and axolotl's own command on a YAML file, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from sftmix.data.tokenized import TokenizedExample
from tests.recipe import tiny

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = tiny.examples(
    17, longest=20
)  # three steps an epoch, the last of one; axolotl counts five for two epochs
# Our loop with the numbers of ``options``: batches of 8, micro-batches of 4.
FLAGS = (
    "train.batch_size=8", "train.micro_batch_size=4", "train.epochs=2", "optim.lr=0.01", "optim.schedule=constant",
    "optim.warmup_ratio=0", "optim.weight_decay=0.1", "train.packing=off", "reference.epochs=1",
)  # fmt: skip


def row(example: TokenizedExample) -> dict[str, Any]:
    """An example in axolotl's columns."""
    labels = [i if s else -100 for i, s in zip(example.input_ids, example.supervised, strict=True)]
    return {"input_ids": list(example.input_ids), "attention_mask": [1] * len(labels), "labels": labels}


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """A YAML file's options: a pretokenised data set, two epochs, a checkpoint after each."""
    found: dict[str, Any] = {
        "base_model": str(folder / "model"), "sequence_len": 64, "micro_batch_size": 4,
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": None}],
        "gradient_accumulation_steps": 2, "num_epochs": 2, "learning_rate": 0.01, "optimizer": "adamw_torch",
        "lr_scheduler": "constant", "weight_decay": 0.1, "warmup_steps": 0, "logging_steps": 1, "seed": 0,
        "bf16": False, "fp16": False, "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"), "dataloader_pin_memory": False,
        "plugins": ["sftmix.axolotl.SFTMixPlugin"], "sftmix": {"reference": "online"},
    }  # fmt: skip
    return {**found, **changes}


def prepare(folder: Path, examples: Mapping[str, TokenizedExample] = EXAMPLES, **sizes: Any) -> None:
    """The model and the data."""
    tiny.causal_lm(**sizes).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps(row(example)) for example in examples.values()]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def run(folder: Path, found: dict[str, Any], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``axolotl train`` on a file with these options; what it printed is in ``log``."""
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(found))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    module = "tests.recipe.axolotl.ranks" if processes > 1 else "axolotl.cli.train"
    command = [*(launcher if processes > 1 else []), "-m", module, str(path)]
    told = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder, env={**os.environ, **told}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    (folder / "log").write_text(result.stdout + result.stderr)
    return result


def train(folder: Path, found: dict[str, Any], *, processes: int = 1) -> None:
    result = run(folder, found, processes=processes)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def assert_close(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def logged(out: Path, key: str) -> list[float]:
    """What the training logged, from its newest checkpoint."""
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [record[key] for record in history if key in record]
