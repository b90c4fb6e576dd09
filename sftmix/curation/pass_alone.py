"""A scoring pass without a run: every example of a file, by one model or by several checkpoints of one.

The folder holds config.yaml, tokens/, and what is left at the end: scores.parquet, scores.jsonl, kept_ids.txt. A pass
that was stopped goes on where it stood; scores of other examples or other models are refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from sftmix.config import ModelConfig
from sftmix.curation.records import write_records
from sftmix.data.fingerprint import tokenizer_facts
from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.sums import OnBatch, Passes, by_length, difficulties, read_answers
from sftmix.files import replacing
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.packing import packs
from sftmix.model.parallel import shard
from sftmix.model.tokenizer import load_tokenizer
from sftmix.progress import bar, say
from sftmix.rank import is_main
from sftmix.run.scoring import Kept, Rows, score_slices
from sftmix.run.start import record
from sftmix.scores.dynamics import read_table, to_table
from sftmix.scores.table import SCORES, ExampleScores, read_scores, score_row
from sftmix.training.saving import Rhythm

if TYPE_CHECKING:
    from sftmix.run.session import Session

TABLE, LINES, KEPT = "scores.parquet", "scores.jsonl", "kept_ids.txt"
_ABOUT = b"sftmix.scores"


def checkpoints(model: str) -> list[str]:
    """The models that a name stands for: itself, or the checkpoints of a folder that holds nothing else to load."""
    folder = Path(model).expanduser()
    if not folder.is_dir() or any(
        (folder / name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        return [model]
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return [str(path) for path in sorted(found, key=_step)] or [model]


def score_alone(session: Session, models: Sequence[str], *, ifd: bool) -> ExampleScores:
    """Score the session's examples with each model, write the files, and return the scores.

    ``ifd`` costs a second, shorter pass. Raises ``ValueError`` for models of different tokenizers, and for a folder
    with scores of something else.
    """
    folder = session.folder.path
    path = folder / TABLE
    sources = [_source(session, name) for name in models]
    about = json.dumps(
        {
            "examples": session.train_id, "models": [session.models.identity(source) for source in sources],
            "ifd": ifd, "max_length": session.token_options.max_length,
        }
    )  # fmt: skip
    _refuse_others(path, about)
    _check_tokenizers(session, models, sources)
    session.hold()
    record(session.config)
    if not path.exists():
        rows = [
            row
            for at, source in enumerate(sources)
            for row in _score(session, source, models[at], at, ifd=ifd)
        ]
        if is_main():
            table = to_table(
                sorted(rows, key=lambda row: (row["checkpoint"], row["example"])), SCORES, "scores"
            )
            with replacing(path) as temporary:
                pq.write_table(table.replace_schema_metadata({_ABOUT: about}), temporary)
            shutil.rmtree(session.folder.scoring, ignore_errors=True)
    else:
        say(f"score: done before, {path}")
    session.barrier()
    scores = read_scores(path)
    if is_main():
        write_records(session, scores, folder / LINES, folder / KEPT)
    session.barrier()
    return scores


def _source(session: Session, name: str) -> ModelConfig:
    own = session.config.model
    if name == own.name:
        return session.models.source
    return dataclasses.replace(own, name=name, gguf_file=None, revision=None)


def _step(path: Path) -> int:
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else 0


def _refuse_others(path: Path, about: str) -> None:
    if not path.exists():
        return
    read_table(path, SCORES, "score")  # a damaged file says so
    found = (pq.read_schema(path).metadata or {}).get(_ABOUT, b"{}").decode()
    if found != about:
        before, now = json.loads(found), json.loads(about)
        differ = [key for key in now if before.get(key) != now[key]]
        raise ValueError(
            f"{path}: expected scores of the same {' and '.join(differ)}, got others; take another --out, or remove it"
        )


def _check_tokenizers(session: Session, models: Sequence[str], sources: Sequence[ModelConfig]) -> None:
    """Perplexities over other tokens cannot be averaged."""
    own = tokenizer_facts(session.tokenizer)["model"]
    for name, source in list(zip(models, sources, strict=True))[1:]:
        try:
            found = tokenizer_facts(load_tokenizer(source))["model"]
        except ValueError:  # a checkpoint need not bring one along
            say(f"score: {name} has no tokenizer, that of {models[0]} is used")
            continue
        if found != own:
            raise ValueError(
                f"model: expected checkpoints with one tokenizer, got another one in {name} than in {models[0]}; "
                "score them one by one"
            )


def _score(session: Session, source: ModelConfig, name: str, index: int, *, ifd: bool) -> Rows:
    """The rows of one model; shared out over the processes, and kept as they come."""
    config = session.config
    model = session.models.load(source, trainable=False)
    packed = packs(model, config.train.packing)
    shard(model, session.world)
    passes = Passes(config.evaluate.batch_size, session.pad_id, config.train.impl, packed, session.world)
    step = _step(Path(name)) or index
    score = partial(
        _rows, model, passes, begin=session.tokenizer.bos_token_id if ifd else None, ifd=ifd,
        facts={"checkpoint": index, "step": step, "model": name},
    )  # fmt: skip
    rhythm = Rhythm(config.train.checkpoint_every)
    point = f"{session.models.identity(source)} {session.train_id} {ifd}"
    kept = Kept(session.folder.scoring / f"point-{index:03d}.parquet", point, SCORES)
    session.folder.scoring.mkdir(parents=True, exist_ok=True)
    with bar(f"score {Path(name).name}") as progress, rhythm.signals.caught():
        return score_slices(
            session, model, by_length(list(session.train.values())), score, kept, rhythm, progress
        )


def _rows(
    model: SFTMixModel, passes: Passes, part: list[TokenizedExample], tell: OnBatch, *, begin: int | None, ifd: bool,
    facts: dict[str, Any],
) -> Rows:  # fmt: skip
    size, share = len(part), 2 if ifd else 1  # of the examples that are done, after the first pass
    answers = read_answers(model, part, passes, lambda done, _: tell(done // share, size))

    def second(done: int, of: int) -> None:
        tell((size + size * done // of) // 2, size)

    found = difficulties(model, part, answers, passes, begin=begin, progress=second) if ifd else {}
    sizes = {example.id: example.num_supervised for example in part}
    return [
        score_row(
            answer.id,
            nll_sum=answer.nll_sum,
            num_tokens=sizes[answer.id],
            num_top1=answer.num_top1,
            entropy_sum=answer.entropy_sum,
            ifd=found.get(answer.id),
            **facts,
        )
        for answer in answers
    ]
