"""Host memory of loading a model, as a multiple of the model's size: ``python -m bench.load``.

Each case is a process of its own that loads a two-layer model first, so that what is counted is the weights and not
the libraries. Told are the most that the process ever held, the most of it that the system cannot take back (anonymous
memory: pages of a file that are only read are dropped when memory is short), and what it holds once the model stands.
The record goes to bench/results/load.json and a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, device_name

RECORD = Path(__file__).with_name("results") / "load.json"
PACKAGES = ("torch", "transformers", "safetensors")
AT_MOST = 1.2  # of the model's size, mapped pages of its files counted
SHARD = 2**29  # bytes a file of weights is closed at
SIZES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
}  # fmt: skip
CASES = (  # size, data type of the files, data type of the run
    ("135M", "bfloat16", "bfloat16"),
    ("135M", "float32", "bfloat16"),
    ("1B", "bfloat16", "bfloat16"),
)


def write_model(folder: Path, size: str, dtype: str) -> None:
    """A random Llama with files of weights in ``dtype``, drawn and written one file at a time; and a tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    config = LlamaConfig(**SIZES[size], architectures=["LlamaForCausalLM"], dtype=dtype)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(found.numel() for found in shards[-1].values()) * kind.itemsize >= SHARD:
            shards.append({})
        shards[-1][name] = shape
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=kind).normal_(std=0.02, generator=generator)
            for name, shape in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)


def _status(key: str) -> int:
    """Bytes of one line of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def load(folder: str, dtype: str, warm: str, answer: Any) -> None:
    """Bytes of the model that ``folder`` holds, and of the process that loads it, beyond what it held before."""
    from sftmix.config import ModelConfig
    from sftmix.model.load import load_model

    load_model(ModelConfig(name=warm, dtype=dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    held, anonymous = _status("VmRSS"), _status("RssAnon")
    most, done = [anonymous], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            most[0] = max(most[0], _status("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    started = time.perf_counter()
    model, _tokenizer = load_model(ModelConfig(name=folder, dtype=dtype))
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    answer.send(
        {
            "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "peak_bytes": _status("VmHWM") - held,
            "anonymous_bytes": most[0] - anonymous,
            "held_bytes": _status("VmRSS") - held,
            "seconds": seconds,
        }
    )


def load_tokenizer(folder: str, dtype: str, warm: str, answer: Any) -> None:
    """Bytes of the process that loads the tokenizer of ``folder`` alone, at most, beyond what it held before."""
    from sftmix.config import ModelConfig
    from sftmix.model.load import load_model
    from sftmix.model.tokenizer import extended_tokenizer

    load_model(ModelConfig(name=warm, dtype=dtype))
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS")
    _kept = extended_tokenizer(ModelConfig(name=folder, dtype=dtype))
    answer.send({"tokenizer_bytes": _status("VmHWM") - held})


def _in_a_process(what: Callable[..., None], *args: str) -> dict[str, Any]:
    """What ``what`` answers in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=what, args=(*args, theirs))
    process.start()
    theirs.close()
    told: dict[str, Any] = ours.recv()  # EOFError where the process died; its own traceback stands above
    process.join()
    return told


def measure(cases: Sequence[tuple[str, str, str]], command: str, base: str | None = None) -> dict[str, Any]:
    """The record of all cases; ``base`` is a folder with bfloat16 files in place of the random 135M's."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        warm = Path(temporary) / "warm"
        write_model(warm, "tiny", "bfloat16")
        for number, (size, files, run) in enumerate(cases):
            folder = Path(temporary) / str(number)
            given = base is not None and (size, files) == ("135M", "bfloat16")
            if not given:
                write_model(folder, size, files)
            args = (str(base if given else folder), run, str(warm))
            told = {**_in_a_process(load, *args), **_in_a_process(load_tokenizer, *args)}
            results.append({"model": "SmolLM2-135M" if given else size, "files": files, "run": run, **told})
            for path in folder.glob("*.safetensors"):
                path.unlink()
    return {
        "cases": results,
        "device": device_name("cpu"), "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(), "command": command,
    }  # fmt: skip


def section(record: dict[str, Any]) -> str:
    """The record in words, for RESULTS.md."""
    rows, missed = [], []
    for case in record["cases"]:
        size = case["model_bytes"]
        peak, anonymous, held = (case[f"{name}_bytes"] / size for name in ("peak", "anonymous", "held"))
        what = f"{case['model']}, {case['files']} files, {case['run']}"
        if max(peak, anonymous, held) > AT_MOST:
            missed.append(what)
        rows.append(
            f"| {what} | {size / 2**20:,.0f} | {peak:.2f} | {anonymous:.2f} | {held:.2f} | "
            f"{case['tokenizer_bytes'] / size:.2f} | {case['seconds']:.1f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    verdict = "met" if not missed else f"missed with {'; '.join(missed)}, met with the others"
    return (
        "**Host memory of loading a model**, as a multiple of the model's size\n\n"
        "| model | MiB | most in all | of it what the system cannot take back | held in the end | the tokenizer alone "
        "| seconds |\n|---|--:|--:|--:|--:|--:|--:|\n" + "\n".join(rows) + "\n\n"
        f"Asked: at most {AT_MOST:g} in the first three: {verdict}. Files are mapped, not copied: where they are in "
        "another type than the run, their pages stand beside the model until they are closed, and the system drops "
        "them where memory is short. A tokenizer of a real vocabulary weighs much beside a small model. "
        f"{record['device']}; {versions}; commit {record['commit']}: `{record['command']}`"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument(
        "--model", help="folder of SmolLM2-135M in bfloat16; without it a random one of its shape"
    )
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args(argv)
    command = "python -m bench.load" + (f" --model {args.model}" if args.model else "")
    record = measure(CASES, command, args.model)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(section(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
