"""The README's picture and table of the demo: ``python -m bench.pictures RUN_FOLDER``, on the machine of the run.

Reads what the run wrote (plots/data_map.png, evaluation.json, metrics.jsonl, config.yaml), writes a small picture and
a JSON file with figures, machine, versions, commit and command beside it into bench/pictures/, and the README's block
from that. Without a folder only the block is written again; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT, commit, device_name, versions
from bench.report import README, update

FOLDER = ROOT / "bench" / "pictures"
MARKERS = (
    "<!-- demo: written by `python -m bench.pictures RUN_FOLDER`, do not edit -->",
    "<!-- end of demo -->",
)
WIDTH = 900  # pixels, as wide as a README is shown
MARGIN = 8  # white pixels around, so that nothing touches a dark page
COLOURS = 256  # of the palette
MOST_BYTES = 60_000
MODELS = {"base": "base model", "ntp": "next-token", "sftmix": "SFTMix"}
# What is told of the settings, by section of config.yaml.
SETTINGS = {
    "train": ("tuning", "epochs", "batch_size"), "optim": ("lr",), "mixup": ("weight", "alpha"),
    "reference": ("epochs", "checkpoints_per_epoch"),
}  # fmt: skip


def shrink(source: Path, target: Path) -> dict[str, Any]:
    """Write ``source`` to ``target`` at most ``WIDTH`` pixels wide, opaque on white, with a palette; what it became.

    Raises ValueError where it is still larger than ``MOST_BYTES``.
    """
    from PIL import Image, ImageOps

    with Image.open(source) as opened:
        page = Image.new(
            "RGBA", opened.size, "white"
        )  # a transparent page would be black text on a dark screen
        page.alpha_composite(opened.convert("RGBA"))
    width = min(WIDTH, page.width) - 2 * MARGIN
    inner = page.convert("RGB").resize(
        (width, round(page.height * width / page.width)), Image.Resampling.LANCZOS
    )
    small = ImageOps.expand(inner, MARGIN, "white").quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE)
    small.save(target, optimize=True)
    content = target.read_bytes()
    if len(content) > MOST_BYTES:
        raise ValueError(f"{target.name}: expected at most {MOST_BYTES} bytes, got {len(content)}")
    digest = hashlib.sha256(content).hexdigest()
    return {
        "file": target.name,
        "width": small.width,
        "height": small.height,
        "bytes": len(content),
        "sha256": digest,
    }


def training(run: Path, method: str) -> dict[str, Any]:
    """Steps, supervised tokens and seconds of one training run; empty for a model that was not trained."""
    path = run / f"train-{method}" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not records:
        return {}
    return {
        "steps": records[-1]["step"],
        "tokens": sum(record["num_tokens"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def dtype(run: Path) -> str:
    """The data type of the trained weights, as the exported model says it; empty without one."""
    path = run / "train-sftmix" / "model" / "config.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["dtype"]) if path.exists() else ""


def figures(run: Path) -> dict[str, Any]:
    """What the run found: a row for each model, its settings, and the seconds from its first file to its last."""
    import yaml  # type: ignore[import-untyped]

    needed = [
        run / name for name in ("evaluation.json", "config.yaml", "plots/data_map.png", "dynamics.parquet")
    ]
    if missing := [path.name for path in needed if not path.exists()]:
        raise ValueError(f"run folder: expected a finished run, got {run} without {', '.join(missing)}")
    evaluation = json.loads(needed[0].read_text(encoding="utf-8"))
    config = yaml.safe_load(needed[1].read_text(encoding="utf-8"))
    models = {
        name: {**{key: found[key] for key in ("nll", "perplexity", "token_accuracy")}, **training(run, name)}
        for name, found in evaluation.items()
    }
    first = next(iter(evaluation.values()))
    # A run that was stopped has the pause in its seconds; --note is the place to say so.
    written = [path.stat().st_mtime for path in run.rglob("*") if path.is_file()]
    return {
        "models": models,
        "heldout": {"examples": first["num_examples"], "tokens": first["num_tokens"]},
        "examples": config["data"]["limit"],
        "dtype": dtype(run) or config["model"]["dtype"],
        "settings": {
            f"{section}.{key}": config[section][key] for section, keys in SETTINGS.items() for key in keys
        },
        "seconds": round(max(written) - min(written)),
    }


def record(run: Path, command: str, note: str) -> dict[str, Any]:
    """Picture, figures and where they come from, as the JSON file holds them."""
    found = figures(run)
    FOLDER.mkdir(parents=True, exist_ok=True)
    return {
        "command": command, "note": note, "device": device_name(_backend()), "versions": versions(),
        "commit": commit(), **found, "picture": shrink(run / "plots" / "data_map.png", FOLDER / "data_map.png"),
    }  # fmt: skip


def _backend() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def table(models: dict[str, Any]) -> list[str]:
    """The demo's table: how each model was trained and how it predicts the held-out answers."""
    lines = [
        "| model | steps | tokens | seconds | NLL | perplexity | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in models.items():
        spent = [f"{found[key]:,.0f}" if key in found else "–" for key in ("steps", "tokens", "seconds")]
        held = [f"{found['nll']:.4f}", f"{found['perplexity']:.3f}", f"{found['token_accuracy']:.2%}"]
        lines.append("| " + " | ".join([MODELS.get(name, name), *spent, *held]) + " |")
    return lines


def block(found: dict[str, Any]) -> str:
    """The README's Markdown between its markers."""
    picture, heldout = f"{FOLDER.relative_to(ROOT).as_posix()}/{found['picture']['file']}", found["heldout"]
    minutes, seconds = divmod(found["seconds"], 60)
    about = (
        f"Each dot is one of the demo's {found['examples']} training examples: how much its perplexity varies over the "
        "scoring points, and its confidence, the negative mean. The dashed line is the median that cuts the halves."
    )
    origin = (
        f"One run of `{found['command']}`, {minutes} min {seconds:02d} s from its first file to its last: "
        f"{found['device']}, {found['dtype']}, torch {found['versions']['torch']}, commit "
        f"{found['commit']}. NLL (nats a token), perplexity and accuracy (most likely token) are of "
        f"{heldout['examples']} held-out answers, {heldout['tokens']:,} tokens; seconds are of training steps."
        + (f" {found['note']}" if found["note"] else "")
    )
    image = f"![Data map: the demo's training examples by variability and confidence]({picture})"
    return "\n".join([image, "", _wrapped(about), "", *table(found["models"]), "", _wrapped(origin)])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__)
    parser.add_argument("run_folder", nargs="?", type=Path, help="a finished run, e.g. runs/demo")
    parser.add_argument("--command", default="make demo", help="how the run was started")
    parser.add_argument(
        "--note", default="", help="what a reader must know, e.g. that the run was stopped and resumed"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README differs")
    args = parser.parse_args(argv)
    described = FOLDER / "data_map.json"
    if args.run_folder is not None and not args.check:
        try:
            found = record(args.run_folder, args.command, args.note)
        except ValueError as problem:
            parser.error(str(problem))
        described.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(described.read_text(encoding="utf-8"))
    picture = FOLDER / found["picture"]["file"]
    if hashlib.sha256(picture.read_bytes()).hexdigest() != found["picture"]["sha256"]:
        print(f"{picture.name} is not the picture that {described.name} describes", file=sys.stderr)
        return 1
    return update(README, block(found), MARKERS, check=args.check, command="python -m bench.pictures")


if __name__ == "__main__":
    sys.exit(main())
