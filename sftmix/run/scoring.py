"""Scoring the saved points of the reference: shared out over the processes, and kept as it goes.

What is scored of a point stands in ``scoring/point-000.parquet``, with a hash of the point's own sums, until the stage
is finished: a stopped pass goes on after the last example that was kept, with the batches it would have had.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from sftmix.data.fingerprint import content_hash
from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.answers import by_length
from sftmix.evaluation.figures import score_examples
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
    config, folder, world = session.config, session.folder, session.world
    step = json.loads(folder.point_step(index).read_text(encoding="utf-8"))["step"]
    point, path = (
        content_hash(folder.point(index) / META),
        folder.scoring / f"{folder.point(index).name}.parquet",
    )
    rows = _kept(path, point)
    done = {row["example"] for row in rows}
    left = [example for example in examples if example.id not in done]
    slice_size = config.evaluate.batch_size * world.size * _ROUNDS
    for number, start in enumerate(range(0, len(left), slice_size), start=1):
        part = left[start : start + slice_size]
        before = len(rows)
        rows += score_examples(
            model, part, checkpoint=index, step=step, batch_size=config.evaluate.batch_size, pad_id=session.pad_id,
            impl=config.train.impl, packed=packed, world=world,
            progress=partial(_tell, progress, before, len(examples)),
        )  # fmt: skip
        words = sum_over_world(torch.tensor(rhythm.word(), device=model.device), world).tolist()
        due, signal = rhythm.heard(words, number * _ROUNDS, stride=_ROUNDS)
        if is_main() and (due or start + slice_size >= len(left)):
            _keep(path, rows, point)
            rhythm.begin(0)
        if signal:
            session.barrier()
            raise Stopped(
                signal, f"score: {len(rows)} of {len(examples)} examples of {folder.point(index).name}"
            )
    return rows


def _tell(progress: Bar, before: int, total: int, done: int, _part: int) -> None:
    progress.batches(before + done, total)


def _kept(path: Path, point: str) -> Rows:
    """What was scored of this very point before; none, with a word, where the file is another's or damaged."""
    if not path.exists():
        return []
    try:
        if (pq.read_schema(path).metadata or {}).get(_POINT) == point.encode():
            rows: Rows = read_table(path, SCHEMA, "score").to_pylist()
            return rows
        say(f"score: {path.name} is of other weights, its examples are scored again")
    except (ValueError, OSError) as error:
        say(f"score: again from the start of {path.stem}, {error}")
    return []


def _keep(path: Path, rows: Rows, point: str) -> None:
    table = to_table(rows, SCHEMA, "scoring").replace_schema_metadata({_POINT: point})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
