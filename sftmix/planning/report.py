"""A plan in words, and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sftmix.hardware import GB, LINK_SHARE
from sftmix.planning.plan import Plan
from sftmix.planning.remedies import Remedy
from sftmix.planning.work import Flops


def as_data(plan: Plan, remedies: Sequence[Remedy]) -> dict[str, Any]:
    """Numbers for JSON: bytes, flops, seconds."""
    question, model, gpu = plan.question, plan.model, plan.question.gpu
    return {
        "model": {
            "class": model.kind, "parameters": model.count, "trained": model.trained, "blocks": model.num_blocks,
            "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "tied": model.is_tied,
        },
        "gpu": dataclasses.asdict(gpu),
        "layout": {
            "gpus": question.gpus, "shards": question.shards, "copies": question.copies,
            "gpus_per_node": question.in_a_node, "idle_gpus": plan.idle,
        },
        "load": {
            **dataclasses.asdict(plan.load), "micro_batches_per_gpu": plan.micro_batches,
            "checkpointing": question.kind, "loss": plan.loss.way,
        },
        "memory": {
            "fits": plan.fits, "bytes": plan.memory.total, "phase": plan.memory.phase,
            "causes": plan.memory.causes, "phases": plan.memory.phases, "start_bytes": plan.memory.start,
            "start_fits": plan.starts,
        },
        "traffic": {
            "bytes": plan.traffic.total, "causes": plan.traffic.causes,
            "head": {**dataclasses.asdict(plan.traffic.head), "bytes": plan.traffic.head.bytes},
        },
        "flops": {**dataclasses.asdict(_of_gpu(plan)), "total": _of_gpu(plan).total},
        "step": {**dataclasses.asdict(plan.seconds), "seconds": plan.seconds.total},
        "tokens_per_second": plan.tokens_per_second,
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "would_fit": [dataclasses.asdict(remedy) for remedy in remedies],
        "assumptions": {"efficiency": question.efficiency, "link_share": LINK_SHARE},
    }  # fmt: skip


def in_words(plan: Plan, remedies: Sequence[Remedy]) -> list[str]:
    """Lines to print."""
    return [
        *_subject(plan),
        "",
        *_memory(plan),
        "",
        *_step(plan),
        "",
        *_stages(plan),
        *_verdict(plan, remedies),
    ]


def _subject(plan: Plan) -> list[str]:
    question, model, load = plan.question, plan.model, plan.load
    layout = f"{question.gpus} x {question.gpu.name}"
    if question.gpus > 1:
        layout += f", sharded over {question.shards}"
    if question.copies > 1:
        layout += f", {question.copies} replicas"
    dtype = str(model.dtype).removeprefix("torch.")
    return [
        f"model: {model.kind}, {model.count:,} parameters, {model.trained:,} train, {dtype}"
        + (", head and embedding tied" if model.is_tied else ""),
        f"GPUs: {layout}",
        f"micro-batch: {load.sequences} sequences of {load.length} tokens, {load.rows:,} rows of the head; "
        f"{plan.micro_batches} a GPU and step; activation checkpointing: {question.kind}; loss: {plan.loss.way}",
    ]


def _memory(plan: Plan) -> list[str]:
    gpu, found = plan.question.gpu, plan.memory
    lines = [f"memory of a GPU, at its fullest ({found.phase}):"]
    lines += _table({cause: size for cause, size in found.causes.items() if size}, GB, "GB")
    share = found.total / gpu.memory_bytes
    lines.append(_line("together", found.total / GB, f"GB, {share:.0%} of {gpu.memory_bytes / GB:.0f}"))
    return lines


def _of_gpu(plan: Plan) -> Flops:
    """Of a GPU in a step."""
    values = dataclasses.asdict(plan.flops)
    return Flops(**{name: plan.micro_batches * value for name, value in values.items()})


def _step(plan: Plan) -> list[str]:
    seconds, lines = plan.seconds, []
    if plan.question.gpus > 1:
        lines.append("received by a GPU in an optimizer step:")
        lines += _table({cause: size for cause, size in plan.traffic.causes.items() if size}, GB, "GB")
        head = plan.traffic.head
        if not plan.model.is_tied:
            lines.append(
                f"  head: {head.chosen} (gathering its weight {head.gather / GB:.2f} GB, exchanging rows "
                f"{head.exchange / GB:.2f} GB)"
            )
        lines.append("")
    work = _of_gpu(plan)
    lines.append("flops of a GPU in an optimizer step:")
    lines += _table(
        {name: value for name, value in dataclasses.asdict(work).items() if value}, 10**12, "TFLOP"
    )
    lines.append(
        f"step: {seconds.total:.3g} s (compute {seconds.compute:.3g}, traffic {seconds.traffic:.3g} beside it, "
        f"optimizer {seconds.optimizer:.3g}); {plan.tokens_per_second:,.0f} tokens/s"
    )
    share = f"{plan.question.efficiency:.0%} of the peak and {LINK_SHARE:.0%} of the links"
    lines.append(f"  assumed, not measured: {share}; {plan.question.gpu.source}")
    return lines


def _stages(plan: Plan) -> list[str]:
    tokens = plan.question.tokens
    if not tokens:
        return ["stages: give --tokens, the tokens of the training examples"]
    lines = [f"stages, with {tokens:,} tokens of training examples:"]
    for stage in plan.stages:
        lines.append(
            f"  {stage.name:<14}{_duration(stage.seconds):>10}{stage.gpu_hours:>12,.2f} GPU hours"
            f"{stage.tokens:>18,} tokens"
        )
    together = sum(stage.seconds for stage in plan.stages)
    hours = sum(stage.gpu_hours for stage in plan.stages)
    lines.append(f"  {'together':<14}{_duration(together):>10}{hours:>12,.2f} GPU hours")
    return lines


def _verdict(plan: Plan, remedies: Sequence[Remedy]) -> list[str]:
    gpu, lines = plan.question.gpu, [""]
    if plan.fits:
        lines.append(f"fits: {(gpu.memory_bytes - plan.memory.total) / GB:.1f} GB are left")
    else:
        over = plan.memory.total - gpu.memory_bytes
        most = max(plan.memory.causes, key=lambda cause: plan.memory.causes[cause])
        lines.append(
            f"does not fit: {over / GB:.1f} GB too much on each GPU, most of it {most} "
            f"({plan.memory.causes[most] / GB:.1f} GB). What would fit:"
        )
        lines += [f"  {r.what}: {r.total / GB:.1f} GB   {r.flags}" for r in remedies]
        if not remedies:
            lines.append("  nothing of checkpointing, smaller micro-batches, LoRA and up to 4,096 GPUs")
    if not plan.starts:
        lines.append(
            f"warning: a process holds {plan.memory.start / GB:.0f} GB before the first step, its shards and a "
            f"whole unit: more than the GPU's {gpu.memory_bytes / GB:.0f}"
        )
    if plan.idle:
        train = plan.question.config.train
        lines.append(
            f"warning: {plan.idle} of {plan.question.gpus} GPUs get no micro-batch: train.batch_size="
            f"{train.batch_size} makes {plan.question.gpus - plan.idle} of {plan.load.sequences}"
        )
    return lines


def _table(values: Mapping[str, float], unit: float, name: str) -> list[str]:
    return [_line(cause, value / unit, name) for cause, value in values.items()]


def _line(name: str, value: float, unit: str) -> str:
    return f"  {name:<34}{value:>12,.3f} {unit}"


def _duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves a whole one."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} s"
