"""``sftmix plan``: what a run would take, and whether it fits, before a GPU is rented."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from sftmix.config import Config, load_config
from sftmix.progress import activity, say
from sftmix.recipes import config_file
from sftmix.run.start import knob_flags

BFLOAT16, AUTO = "bfloat16", "auto"
Number = float | None


def plan(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="folder or file with a model's config.json")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs in all, 1 to 4096")] = 1,
    tokens: Annotated[int, typer.Option(help="tokens of the training examples")] = 0,
    gpu: Annotated[str, typer.Option(help="A100-80, H100-80, H200, B200, L40S or RTX4090")] = "H100-80",
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs that share a node's links; 8")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of a sequence; data.max_length")] = None,
    answers: Annotated[float, typer.Option(help="share of the tokens that bears loss")] = 1.0,
    efficiency: Annotated[Number, typer.Option(help="share of the peak flops that is reached")] = None,
    gpu_flops: Annotated[Number, typer.Option(help="bfloat16 TFLOP/s, in place of the datasheet's")] = None,
    gpu_memory: Annotated[Number, typer.Option(help="GB")] = None,
    gpu_bandwidth: Annotated[Number, typer.Option(help="GB/s of its memory")] = None,
    gpu_link: Annotated[Number, typer.Option(help="GB/s received from its node's GPUs")] = None,
    gpu_network: Annotated[Number, typer.Option(help="GB/s received from other nodes")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of knobs, or a recipe")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Memory, traffic, time and cost of a run, before it. And what would fit, where it does not."""
    settled = _configuration(model, config_file(config), ctx.args)
    with activity("loading torch and transformers"):
        from sftmix import hardware
        from sftmix.planning.plan import Question, make_plan
        from sftmix.planning.remedies import find_remedies
        from sftmix.planning.report import as_data, in_words

    chosen = hardware.find_gpu(
        gpu, flops=gpu_flops, memory=gpu_memory, bandwidth=gpu_bandwidth, link=gpu_link, network=gpu_network
    )
    question = Question(
        settled, chosen, gpus=gpus, tokens=tokens, per_node=gpus_per_node, length=length, answers=answers,
        efficiency=hardware.EFFICIENCY if efficiency is None else efficiency,
    )  # fmt: skip
    with activity("planning"):
        found = make_plan(question)
        remedies = find_remedies(found)
    if as_json:
        print(json.dumps(as_data(found, remedies)))
        return
    for line in in_words(found, remedies):
        say(line)


def _configuration(model: str | None, file: Path | None, extra: list[str]) -> Config:
    """The knobs of a run whose folder and data need not be there; on a GPU ``auto`` is bfloat16."""
    named = [f"model.name={model}"] if model is not None else []
    found = load_config(file, ["run_dir=unset", "data.train=unset", *named, *knob_flags(extra)])
    if found.model.dtype != AUTO:
        return found
    return dataclasses.replace(found, model=dataclasses.replace(found.model, dtype=BFLOAT16))
