"""How long the demo's job takes on this machine, and how many training pairs fit into the time given.

A short probe times the job's parts before the run; the reference's first steps are the second measurement, taken
while nothing depends on the number of pairs yet. Positions are tokens and padding, B * T of a batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sftmix.config import Config
from sftmix.data.tokenized import TokenizedExample
from sftmix.progress import activity, duration, say
from sftmix.training.batch import Batch, collate_plain
from sftmix.training.metrics import Record
from sftmix.training.pairs import epoch_order
from sftmix.training.plan import plain_entries, plan_steps

MIN_PAIRS = 96  # six steps: three scoring points and a split that can be looked at
AIM = 0.9  # share of the time that is planned for: the probe is short and machines are noisy
PROBE_SECONDS = 10.0
PIECES = (2, 8, 64)  # positions of the probe's first batches: a slow machine is found out on a small one
MIXED = 1.2  # a step of SFTMix over one of next-token training
DRAWING = 6.0  # seconds for pictures and tables
CHECK_STEP, CHECK_SECONDS = (
    4,
    20.0,
)  # the reference is looked at after so many steps, or after two that took long


@dataclass(frozen=True)
class Pace:
    """Seconds here: ``train`` and ``score`` for one example, ``token`` for one generated, ``load`` for a model."""

    train: float
    score: float
    token: float
    load: float

    def slower(self, factor: float) -> Pace:
        """The pace of a machine on which everything takes ``factor`` times as long."""
        return Pace(*(factor * value for value in dataclasses.astuple(self)))


class Behind(Exception):
    """The reference's first steps show that the time given is only enough for ``pairs``."""

    def __init__(self, pairs: int) -> None:
        super().__init__(pairs)
        self.pairs = pairs


class Budget:
    """The time given, what is gone of it, and what a number of pairs costs.

    ``seconds``: the limit, counted from ``started`` (``time.perf_counter()``). ``available``: pairs there are.
    """

    def __init__(
        self, config: Config, pace: Pace, *, seconds: float, started: float, heldout: int, available: int
    ) -> None:  # fmt: skip
        self.config, self.pace, self.seconds, self.started = config, pace, seconds, started
        self.heldout, self.available = heldout, available
        self.pairs = self.fitting()
        self._times: list[float] = []
        self._is_checked = False

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def per_pair(self) -> float:
        """Seconds that one more training pair costs: in the reference, at each scoring point, in two runs."""
        points = self.config.reference.checkpoints_per_epoch
        reference = self.config.reference.epochs * (self.pace.train + points * self.pace.score)
        return reference + self.config.train.epochs * (1 + MIXED) * self.pace.train

    def rest(self, pairs: int) -> float:
        """Seconds of the whole job from the reference to the table."""
        evaluate, pace = self.config.evaluate, self.pace
        models = 3 * (self.heldout * pace.score + evaluate.num_samples * evaluate.max_new_tokens * pace.token)
        # The base model is read once; two trained ones are written, read back and compared.
        return models + 7 * pace.load + DRAWING + pairs * self.per_pair()

    def fitting(self) -> int:
        """Pairs that fit into what is left, in whole steps; at least ``MIN_PAIRS``."""
        size = self.config.train.batch_size
        affordable = int((AIM * self.seconds - self.gone - self.rest(0)) / self.per_pair())
        return max(MIN_PAIRS, min(affordable, self.available) // size * size)

    def announce(self) -> None:
        """Say how many pairs are used and how long it will take, and where that is more than was given."""
        total = self.gone + self.rest(self.pairs)
        text = f"demo: {self.pairs} of {self.available} training pairs, about {duration(total)} in all"
        if total > self.seconds:
            text += f": more than the {duration(self.seconds)} given, and even the smallest run takes that"
        say(text)

    def watch(self, step: int, total: int, record: Record) -> None:
        """The trainer's progress callback: measure its first steps; raise ``Behind`` if fewer pairs are needed."""
        self._times.append(record["seconds"])
        early = len(self._times) < CHECK_STEP and sum(self._times) < CHECK_SECONDS
        if self._is_checked or len(self._times) < 2 or early:
            return
        self._is_checked = True
        times = self._times[1:]  # the first step warms up
        size = self.config.train.batch_size
        real = sum(times) / len(times) / size
        factor = real / self.pace.train
        self.pace = self.pace.slower(factor)
        done = len(self._times) * size * real
        if self.gone + self.rest(self.pairs) - done <= self.seconds:
            return
        say(f"demo: steps take {factor:.1f} times what the probe found")
        fewer = self.fitting()
        if fewer < self.pairs:
            raise Behind(fewer)
        self.announce()


def probe(session: Any, *, seconds: float = PROBE_SECONDS) -> Pace:
    """Time the parts of a job with a session's model and examples; takes about ``seconds``, loading excepted.

    Batches grow from 2 positions to a real one. A size that would not fit into the time is left out, and what the
    smaller one took is scaled up.
    """
    source = session.models.source  # a GGUF file is converted here, once: no later load does it again
    session.models.forget()  # a model just converted is in memory: the time of reading one is wanted
    begin = time.perf_counter()
    model = session.models.load(source, trainable=True)
    load = time.perf_counter() - begin
    examples = list(session.train.values())
    with activity("measuring how fast this machine is"):
        model.train()
        train = _per_position(
            lambda batch: model(*_inputs(batch)).loss.backward(), _pieces(session, examples), 0.55 * seconds
        )
        model.zero_grad()
        model.eval()
        with torch.inference_mode():
            score = _per_position(
                lambda batch: model(*_inputs(batch), stats=True), _pieces(session, examples), 0.25 * seconds
            )
            score = min(score, train)  # it is a part of it
            token = _token_seconds(model, 0.2 * seconds, at_least=8 * score)
    config, by_id = session.config, {example.id: example for example in examples}
    steps = plan_steps(
        plain_entries(epoch_order(list(by_id), seed=config.seed, epoch=0)), by_id, epoch=0,
        batch_size=config.train.batch_size, micro_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    chunks = [
        [len(by_id[pair.confident].input_ids) for pair in chunk] for step in steps for chunk in step.chunks
    ]
    padded = sum(len(chunk) * max(chunk) for chunk in chunks) / len(examples)
    exact = sum(sum(chunk) for chunk in chunks) / len(examples)  # scoring sorts all examples: little padding
    return Pace(train * padded, score * exact, token, load)


def _per_position(call: Callable[[Batch], Any], batches: list[Batch], seconds: float) -> float:
    """Seconds per position of the last of ``batches``, measured if the time allows, else from the smaller ones."""
    begin, size, took, slope = time.perf_counter(), 0, 0.0, 0.0
    for batch in batches:
        grown = batch.input_ids.numel() - size
        left = seconds - (time.perf_counter() - begin)
        # Half as much again: small batches promise more than large ones keep.
        if size and 1.5 * (took + slope * grown) > left:
            break
        before, took, size = took, _seconds(call, batch), size + grown
        if took < left / 8:  # the first call of a size warms up, and noise only ever adds
            took = min(took, _seconds(call, batch))
        slope = max(0.0, took - before) / grown if grown and before else slope
    whole = batches[-1].input_ids.numel()
    # A pass costs something however small its batch is, so half of the last rate is the least for what was left out.
    return (took + max(slope, 0.5 * took / size) * (whole - size)) / whole


def _seconds(call: Callable[[Batch], Any], batch: Batch) -> float:
    started = time.perf_counter()
    call(batch)
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize(batch.input_ids.device)
    return time.perf_counter() - started


def _pieces(session: Any, examples: list[TokenizedExample]) -> list[Batch]:
    """Batches from 2 positions to a micro-batch."""
    size = session.config.train.micro_batch_size
    middle = sorted(examples, key=lambda example: len(example.input_ids))[len(examples) // 2 :][:size]
    parts = [[_last_tokens(middle[0], length)] for length in PIECES]
    parts += [middle[: size // 2], middle]
    return [collate_plain(part, pad_id=session.pad_id).to(session.device) for part in parts]


def _last_tokens(example: TokenizedExample, length: int) -> TokenizedExample:
    supervised = (False, *example.supervised[-length:][1:])
    return TokenizedExample(example.id, example.input_ids[-length:], supervised)


def _inputs(batch: Batch) -> tuple[Any, ...]:
    return batch.input_ids, batch.attention_mask, batch.rows, batch.target


def _token_seconds(model: Any, seconds: float, *, at_least: float) -> float:
    """Seconds per generated token, from a few; ``at_least``, a short forward pass, where that takes too long."""
    if 8 * at_least > seconds:
        return at_least
    prompt = torch.ones(1, 8, dtype=torch.int64, device=model.device)
    begin = time.perf_counter()
    model.base.generate(
        prompt, attention_mask=prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0
    )
    return (time.perf_counter() - begin) / 8
