"""Speed and memory of tokenising a data set, beside the tokenizer alone: ``python -m bench.data --rows 1000000``.

A file of short conversations is written, and timed is, in a process of its own each: the tokenizer alone over the
ready rendered texts, batched, with all its threads; and the recipe's way from the file to the tokens on disk (reading,
chat template, spans, checks, counts). Memory is what the recipe's processes hold together beyond what they held before
the first row. The record goes to bench/results/data.json and a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.machine import commit, device_name

RECORD = Path(__file__).with_name("results") / "data.json"
PACKAGES = ("transformers", "tokenizers", "pyarrow")
WORDS = (
    "the harbour opened after nine years of work and people came from every town along the coast to see how the great "
    "bridges were raised over a river that no ship had ever passed before winter while merchants counted barrels"
).split()
AT_LEAST, AT_MOST = 0.5, 2.0  # speed over the tokenizer's alone; memory over the file's size


def write_rows(path: Path, rows: int) -> None:
    """Short conversations of one turn, as JSON lines, the same for the same number."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            question = f"{' '.join(draw.choices(WORDS, k=8))} {i}?"
            answer = " ".join(draw.choices(WORDS, k=draw.randint(10, 25))) + "."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tokenizer_alone(folder: str, path: Path, answer: Any) -> None:
    """Tokens and seconds of the tokenizer over the rendered texts, all its threads at work."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = _tokenizer(folder)
    tokens, seconds = 0, 0.0
    texts: list[str] = []

    def flush() -> None:
        nonlocal tokens, seconds
        started = time.perf_counter()
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        seconds += time.perf_counter() - started
        tokens += sum(map(len, ids))
        texts.clear()

    with open(path, encoding="utf-8") as file:
        for line in file:
            texts.append(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
            if len(texts) == 1000:
                flush()
    if texts:
        flush()
    answer.send({"tokens": tokens, "seconds": seconds})


def recipe(folder: str, path: Path, answer: Any) -> None:
    """Tokens, seconds and memory of the whole way from the file to the tokens on disk."""
    from sftmix.data.prepare import Source, prepare
    from sftmix.data.tokens import TokenOptions

    tokenizer = _tokenizer(folder)
    with tempfile.TemporaryDirectory() as out, _Memory() as memory:
        started = time.perf_counter()
        store = prepare(Source(str(path)), tokenizer, TokenOptions(max_length=2048), folder=Path(out))
        seconds = time.perf_counter() - started
        first = next(iter(store))
        told = {"tokens": store.account.tokens, "seconds": seconds, "examples": len(store), "first": first}
    answer.send({**told, "memory_bytes": memory.most})


class _Memory:
    """The most that this process and its children hold beyond what each held when it was first seen."""

    def __enter__(self) -> _Memory:
        self.most = 0
        self._before: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            held = {pid: _private_bytes(pid) for pid in _family(os.getpid())}
            for pid, size in held.items():
                # A child is counted from what it holds once its imports are done, which is when it first idles.
                self._before.setdefault(pid, size)
                if pid != os.getpid() and _age(pid) < 6:
                    self._before[pid] = size
            self.most = max(self.most, sum(size - self._before[pid] for pid, size in held.items()))


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            told = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        except OSError:
            continue
        found += [int(child) for child in told.split()]
    return found


def _private_bytes(pid: int) -> int:
    """Memory of a process that is not a file's: mapped results can be dropped at any time."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _age(pid: int) -> float:
    try:
        return time.time() - os.stat(f"/proc/{pid}").st_ctime
    except OSError:
        return 0.0


def measure(folder: str, rows: int, command: str) -> dict[str, Any]:
    """The record of one measurement."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows.jsonl"
        write_rows(path, rows)
        context = multiprocessing.get_context("spawn")
        for name, call in (("alone", tokenizer_alone), ("recipe", recipe)):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=call, args=(folder, path, theirs))
            process.start()
            theirs.close()
            results[name] = ours.recv()  # EOFError where the process died; its own traceback stands above
            process.join()
        size = path.stat().st_size
    if results["alone"]["tokens"] != results["recipe"]["tokens"]:
        raise ValueError(f"tokens: expected the same number both ways, got {results}")
    return {
        "rows": rows, "file_bytes": size, **results,
        "speed": results["alone"]["seconds"] / results["recipe"]["seconds"],
        "memory": results["recipe"]["memory_bytes"] / size,
        "device": device_name("cpu"), "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(), "command": command,
    }  # fmt: skip


def section(record: dict[str, Any]) -> str:
    """The record in words, for RESULTS.md."""
    alone, ours = record["alone"], record["recipe"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    speed, memory = record["speed"], record["memory"]
    judged = "met" if speed >= AT_LEAST and memory <= AT_MOST else "missed"
    return (
        f"**Tokenising {record['rows']:,} short conversations** ({record['file_bytes'] / 2**20:.0f} MiB, "
        f"{ours['tokens']:,} tokens)\n\n"
        "| | seconds | tokens/s | of the tokenizer's speed | memory over the file's size |\n|---|--:|--:|--:|--:|\n"
        f"| the tokenizer alone, batched, all threads | {alone['seconds']:.0f} | "
        f"{alone['tokens'] / alone['seconds']:,.0f} | 1 | |\n"
        f"| from the file to tokens on disk | {ours['seconds']:.0f} | {ours['tokens'] / ours['seconds']:,.0f} | "
        f"{speed:.2f} | {memory:.2f} |\n\n"
        f"Asked: at least {AT_LEAST} and at most {AT_MOST:g}: {judged}. {record['device']}; {versions}; commit "
        f"{record['commit']}: `{record['command']}`"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer that has a chat template")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args(argv)
    command = f"python -m bench.data --rows {args.rows} --tokenizer {args.tokenizer}"
    record = measure(args.tokenizer, args.rows, command)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(section(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
