"""Swapped answers and the scores that find them: ``python -m bench.suspects``.

Of real questions and answers (MedQuAD, answers of at most 400 characters) every tenth answer is given to another of
those questions. SmolLM2-135M scores all as it is (NLL and IFD), then trains on them, as the demo does, for three epochs
with the loss of each example taken in every epoch. For every score: the area under the ROC curve of finding the swapped
ones, by seed. The record goes to bench/results/suspects.json and a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.machine import ROOT, commit, device_name

RECORD = Path(__file__).with_name("results") / "suspects.json"
DATA = ROOT.parent / "shared" / "data" / "medquad_train.jsonl.xz"
PACKAGES = ("torch", "transformers")
SWAPPED, LONGEST, EPOCHS, SEEDS, EXAMPLES = 0.1, 400, 3, 5, 200
KNOBS = (
    "data.heldout_fraction=0", "data.max_length=256", "train.tuning=lora", "lora.layers=20:30", "lora.rank=16",
    f"reference.epochs={EPOCHS}", "reference.dynamics=online", "train.batch_size=16", "train.micro_batch_size=8",
    "optim.lr=1e-3", "evaluate.batch_size=16",
)  # fmt: skip
WORDS = {
    "ifd": "IFD before training", "nll": "NLL before training", "epoch": "loss of the first epoch",
    "confidence": f"confidence, over {EPOCHS} epochs", "mean_nll": f"mean NLL, over {EPOCHS} epochs",
    "variability": f"variability, over {EPOCHS} epochs",
}  # fmt: skip


def swapped_pairs(seed: int, count: int) -> tuple[list[dict[str, str]], list[bool]]:
    """``count`` questions with answers, and which of them have another's answer."""
    pool: dict[str, str] = {}
    with lzma.open(DATA, "rt", encoding="utf-8") as file:
        for line in file:
            question, answer = (message["content"] for message in json.loads(line)["messages"][:2])
            if len(answer) <= LONGEST:
                pool.setdefault(question, answer)
    draw = random.Random(seed)
    chosen = draw.sample(list(pool.items()), count)
    marked = draw.sample(range(count), round(SWAPPED * count))
    given = dict(zip(marked, marked[1:] + marked[:1], strict=True))
    rows = [
        {"prompt": question, "completion": chosen[given.get(at, at)][1]}
        for at, (question, _) in enumerate(chosen)
    ]
    # two questions may share an answer word by word: such a swap changes nothing
    return rows, [at in given and rows[at]["completion"] != chosen[at][1] for at in range(count)]


def scores_of(rows: Sequence[dict[str, str]], seed: int, folder: Path) -> dict[str, list[float]]:
    """Every score of every row, the higher the more suspicious."""
    import numpy as np

    from sftmix.config import load_config
    from sftmix.demo.job import find_smollm2
    from sftmix.evaluation.sums import Passes, difficulties, read_answers
    from sftmix.run.session import Session
    from sftmix.training.runs import train_plain

    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, gguf = find_smollm2()
    flags = [
        f"run_dir={folder / 'run'}",
        f"model.name={model}",
        f"model.gguf_file={gguf}",
        f"data.train={data}",
    ]
    config = load_config(None, [*flags, f"seed={seed}", *KNOBS])
    session = Session(config)
    examples, ids = session.train, list(session.train)
    live = session.models.load(session.models.source, trainable=True)
    passes = Passes(batch_size=config.evaluate.batch_size, pad_id=session.pad_id)
    listed = list(examples.values())
    answers = {answer.id: answer for answer in read_answers(live, listed, passes)}
    ifd = difficulties(live, listed, list(answers.values()), passes, begin=session.tokenizer.bos_token_id)
    online = train_plain(config, live, examples, folder=folder / "reference", pad_id=session.pad_id)
    nll = np.array(
        [
            [row["nll_sum"] / row["num_tokens"] for row in sorted(online, key=lambda r: ids.index(r["example"]))
             if row["checkpoint"] == epoch]
            for epoch in range(EPOCHS)
        ]
    )  # fmt: skip
    return {
        "ifd": [ifd[name] for name in ids],
        "nll": [answers[name].nll_sum / examples[name].num_supervised for name in ids],
        "epoch": nll[0].tolist(), "confidence": np.exp(nll).mean(0).tolist(), "mean_nll": nll.mean(0).tolist(),
        "variability": np.exp(nll).std(0).tolist(),
    }  # fmt: skip


def measure(seeds: int, count: int, command: str) -> dict[str, Any]:
    """The record: by seed, the area under the ROC curve of every score."""
    from sftmix.scores.table import auroc

    by_seed = []
    for seed in range(seeds):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows, marks = swapped_pairs(seed, count)
            found = scores_of(rows, seed, Path(folder))
        areas = {name: auroc(values, marks) for name, values in found.items()}
        by_seed.append(
            {"seed": seed, "swapped": sum(marks), "auroc": areas, "seconds": time.perf_counter() - started}
        )
        print(json.dumps(by_seed[-1]), flush=True)
    return {
        "examples": count, "seeds": by_seed, "device": device_name("cpu"),
        "versions": {name: metadata.version(name) for name in PACKAGES}, "commit": commit(), "command": command,
    }  # fmt: skip


def section(record: dict[str, Any]) -> str:
    """The record in words, for RESULTS.md."""
    seeds = record["seeds"]
    rows = []
    for name, words in WORDS.items():
        areas = [seed["auroc"][name] for seed in seeds]
        spread = f" ± {stdev(areas):.3f}" if len(areas) > 1 else ""
        rows.append(f"| {words} | {mean(areas):.3f}{spread} | {min(areas):.3f} | {max(areas):.3f} |")
    swapped = sorted({seed["swapped"] for seed in seeds})
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        "**Finding swapped answers** (`sftmix suspects`): area under the ROC curve, 0.5 being chance, mean and "
        f"standard deviation of {len(seeds)} seeds\n\n| score | AUROC | lowest | highest |\n|---|--:|--:|--:|\n"
        + "\n".join(rows) + f"\n\n{record['examples']} questions of MedQuAD, answers of at most {LONGEST} characters, "
        f"of which {' or '.join(map(str, swapped))} are another's; SmolLM2-135M, LoRA. The loss of the first epoch "
        f"and the scores over epochs are those of the training steps themselves. {record['device']}; {versions}; "
        f"commit {record['commit']}: `{record['command']}`"
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suspects", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args(argv)
    command = "python -m bench.suspects"
    command += f" --seeds {args.seeds}" if args.seeds != SEEDS else ""
    command += f" --examples {args.examples}" if args.examples != EXAMPLES else ""
    record = measure(args.seeds, args.examples, command)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(section(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
