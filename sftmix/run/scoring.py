"""Scoring the saved points of the reference: shared out over the processes, and kept as it goes.

What is scored of a point stands in ``scoring/point-000.parquet``, with a hash of the point's own sums, until the stage
is finished: a stopped pass goes on after the last example that was kept, with the batches it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sftmix.data.fingerprint import content_hash
from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.figures import score_examples
from sftmix.evaluation.sums import OnBatch, by_length
from sftmix.files import replacing
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.packing import packs
from sftmix.model.parallel import shard, sum_over_world
from sftmix.progress import Bar, bar, say
from sftmix.rank import is_main
from sftmix.run.session import Session
from sftmix.scores.dynamics import SCHEMA, read_table, to_table
from sftmix.training.checkpoint import META, load_trainable
from sftmix.training.saving import Rhythm
from sftmix.training.signals import Stopped

Rows = list[dict[str, Any]]
_ROUNDS = 8  # batches of each process between two looks at the clock
_POINT = b"sftmix.point"


def score_points(session: Session) -> Rows:
    """One row of the dynamics per example and saved point.

    Raises ``Stopped`` after a signal, what is scored being kept, and ``ValueError`` where no point is there.
    """
    config, folder = session.config, session.folder
    model = session.models.load(session.models.reference, trainable=True)
    examples = by_length(list(session.reference_examples.values()))
    num_points = config.reference.epochs * config.reference.checkpoints_per_epoch
    points = [index for index in range(num_points) if folder.point(index).exists()]
    if not points:
        raise ValueError(
            f"{folder.point(0)}: expected the weights of a scoring point, found none; run `sftmix reference`"
        )
    packed = packs(model, config.train.packing)
    shard(model, session.world)
    rhythm = Rhythm(config.train.checkpoint_every)
    rows: Rows = []
    # train.max_steps may end the reference run before its last points
    for number, index in enumerate(points, start=1):
        load_trainable(model, folder.point(index))
        with bar(f"score point {number}/{len(points)}") as progress, rhythm.signals.caught():
            rows += _score_point(session, model, examples, index, rhythm, progress, packed=packed)
    return sorted(rows, key=lambda row: (row["checkpoint"], row["example"]))


def _score_point(
    session: Session, model: SFTMixModel, examples: list[TokenizedExample], index: int, rhythm: Rhythm,
    progress: Bar, *, packed: bool,
) -> Rows:  # fmt: skip
    config, folder = session.config, session.folder
    step = json.loads(folder.point_step(index).read_text(encoding="utf-8"))["step"]

    def score(part: list[TokenizedExample], tell: OnBatch) -> Rows:
        return score_examples(
            model, part, checkpoint=index, step=step, batch_size=config.evaluate.batch_size, pad_id=session.pad_id,
            impl=config.train.impl, packed=packed, world=session.world, progress=tell,
        )  # fmt: skip

    kept = Kept(
        folder.scoring / f"{folder.point(index).name}.parquet", content_hash(folder.point(index) / META)
    )
    return score_slices(session, model, examples, score, kept, rhythm, progress)


@dataclass(frozen=True)
class Kept:
    """Where the rows of a pass under way stand, and a hash of what they are about."""

    path: Path
    point: str
    schema: pa.Schema = SCHEMA


def score_slices(
    session: Session, model: SFTMixModel, examples: list[TokenizedExample],
    score: Callable[[list[TokenizedExample], OnBatch], Rows], kept: Kept, rhythm: Rhythm, progress: Bar,
) -> Rows:  # fmt: skip
    """A row of each example, by ``score``, slice after slice; those that were kept before are not scored again.

    Raises ``Stopped`` after a signal, what is scored being kept.
    """
    world, batch_size = session.world, session.config.evaluate.batch_size
    rows = _kept(kept)
    done = {row["example"] for row in rows}
    left = [example for example in examples if example.id not in done]
    slice_size = batch_size * world.size * _ROUNDS
    for number, start in enumerate(range(0, len(left), slice_size), start=1):
        rows += score(left[start : start + slice_size], partial(_tell, progress, len(rows), len(examples)))
        words = sum_over_world(torch.tensor(rhythm.word(), device=model.device), world).tolist()
        due, signal = rhythm.heard(words, number * _ROUNDS, stride=_ROUNDS)
        if is_main() and (due or start + slice_size >= len(left)):
            _keep(kept, rows)
            rhythm.begin(0)
        if signal:
            session.barrier()
            raise Stopped(signal, f"score: {len(rows)} of {len(examples)} examples of {kept.path.stem}")
    return rows


def _tell(progress: Bar, before: int, total: int, done: int, _part: int) -> None:
    progress.batches(before + done, total)


def _kept(kept: Kept) -> Rows:
    """What was scored of this very point before; none, with a word, where the file is another's or damaged."""
    path = kept.path
    if not path.exists():
        return []
    try:
        if (pq.read_schema(path).metadata or {}).get(_POINT) == kept.point.encode():
            rows: Rows = read_table(path, kept.schema, "score").to_pylist()
            return rows
        say(f"score: {path.name} is of other weights, its examples are scored again")
    except (ValueError, OSError) as error:
        say(f"score: again from the start of {path.stem}, {error}")
    return []


def _keep(kept: Kept, rows: Rows) -> None:
    table = to_table(rows, kept.schema, "scoring").replace_schema_metadata({_POINT: kept.point})
    with replacing(kept.path) as temporary:
        pq.write_table(table, temporary)
