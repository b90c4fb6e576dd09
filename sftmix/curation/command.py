"""``sftmix score --data``, ``select``, ``suspects``, ``cartography``: scores without a run, and what they serve."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sftmix.config import Config, load_config, read_config
from sftmix.progress import activity, say, show
from sftmix.recipes import config_file
from sftmix.run.start import knob_flags, resolve

if TYPE_CHECKING:
    from sftmix.curation.selection import Scored
    from sftmix.scores.table import ExampleScores

Folder = Annotated[
    str, typer.Argument(help="a run folder, or what `sftmix score --data` left", show_default=False)
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file of knobs, or a recipe")]


def score_file(
    data: str, models: list[str], out: str | None, *, ifd: bool, config: str | None, extra: list[str]
) -> None:
    """Score every example of a file and leave scores.parquet, scores.jsonl and kept_ids.txt in ``out``."""
    from sftmix.curation.pass_alone import checkpoints

    if not models:
        raise ValueError("model: expected one or more with --data, got none")
    named = [point for model in models for point in checkpoints(model)]
    if len(set(named)) < len(named):
        raise ValueError(f"model: expected every checkpoint once, got {', '.join(named)}")
    folder = out or str(Path("scores") / f"{Path(data).name.split('.')[0]}-{Path(models[0]).name}")
    fixed = [f"data.train={data}", f"model.name={named[0]}", "data.heldout_fraction=0"]
    given = knob_flags(extra)
    _refuse_a_run(folder)
    settled = resolve(folder, config_file(config), [*fixed, *given])
    with activity("loading torch and transformers"):
        from sftmix.curation.pass_alone import LINES, TABLE, score_alone
        from sftmix.run.session import Session

    session = Session(settled)
    session.tell_data()
    scores = score_alone(session, [settled.model.name, *named[1:]], ifd=ifd)
    show(_summary(scores))
    for name in (TABLE, LINES):
        say(f"scores: {Path(folder) / name}")


def _refuse_a_run(folder: str) -> None:
    if (Path(folder) / "stages.json").exists():
        raise ValueError(f"out: expected another folder than a run's, got {folder}")


def _summary(scores: ExampleScores) -> Any:
    """Quantiles of every score."""
    import numpy as np
    from rich.table import Table

    table = Table(
        title=f"{len(scores.examples)} examples, scored at {scores.num_points} point{'s' * (scores.num_points > 1)}",
        title_justify="left",
    )
    table.add_column("score", no_wrap=True)
    for name in ("examples", "lowest", "10 %", "median", "90 %", "highest"):
        table.add_column(name, justify="right")
    for name, values in scores.columns.items():
        own = values[~np.isnan(values)]
        if len(own):
            found = np.quantile(own, (0, 0.1, 0.5, 0.9, 1), method="nearest")
            table.add_row(name, str(len(own)), *(f"{value:.4g}" for value in found))
    return table


def open_scored(folder: str) -> tuple[Config, ExampleScores]:
    """The configuration and the scores of a folder. Raises ``ValueError`` where either is missing or damaged."""
    from sftmix.scores.table import read_scores

    config = read_config(folder)
    paths = [Path(folder) / name for name in ("scores.parquet", "dynamics.parquet")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ValueError(
            f"{folder}: expected scores.parquet or dynamics.parquet, found neither; run `sftmix score`"
        )
    return config, read_scores(path)


def leading(extra: list[str]) -> tuple[str | None, list[str]]:
    """A folder that may come first, and the flags after it: an argument would take a flag's value for itself."""
    if extra and not extra[0].startswith("--") and "=" not in extra[0]:
        return extra[0], extra[1:]
    return None, extra


def select(
    ctx: typer.Context,
    keep: Annotated[str | None, typer.Option(help="how many: 1000, or 30%")] = None,
    by: Annotated[str, typer.Option(help="a score, `longest` (num_tokens) or `random`")] = "confidence",
    take: Annotated[
        str, typer.Option(help="highest, lowest, ends (the middle left out) or middle")
    ] = "highest",
    above: Annotated[float | None, typer.Option(help="only those whose score is above this")] = None,
    below: Annotated[float | None, typer.Option(help="only those whose score is below this")] = None,
    ids: Annotated[str | None, typer.Option(help="file of ids: choose among these alone")] = None,
    without: Annotated[str | None, typer.Option(help="file of ids to leave out")] = None,
    seed: Annotated[int, typer.Option(help="of --by random")] = 0,
    out: Annotated[
        str | None, typer.Option(help="folder to write; by default selected/ in the first")
    ] = None,
    data: Annotated[str | None, typer.Option(help="without a folder: the file to choose from")] = None,
    model: Annotated[str | None, typer.Option(help="with --data: whose tokenizer counts tokens")] = None,
    config: ConfigFile = None,
) -> None:
    """Choose examples by score, length, list or at random.

    FOLDER is a run's, or what `sftmix score --data` left. Writes selected.jsonl (the records as they are),
    kept_ids.txt and dropped_ids.txt.
    """
    folder, flags = leading(ctx.args)
    from sftmix.curation import selection
    from sftmix.scores.given import read_ids

    if (folder is None) == (data is None):
        raise ValueError(
            f"folder: expected a folder or --data, got {'neither' if folder is None else 'both'}"
        )
    if all(given is None for given in (keep, ids, without, above, below)):
        raise ValueError(
            "keep: expected a number or a share, or --ids, --without, --above or --below, got none of them"
        )
    scored = _scored_folder(folder) if folder is not None else _scored_file(str(data), model, config, flags)
    names = set(scored.examples)
    chosen = selection.listed(names, read_ids(ids), "ids") if ids is not None else set(names)
    chosen -= selection.listed(names, read_ids(without), "without") if without is not None else set()
    if take != "highest" and (keep is None or by == "random"):
        raise ValueError(f"take: expected it beside --keep and a score, got {take}")
    if seed and by != "random":
        raise ValueError(f"seed: expected it beside --by random, got {seed}")
    score = "num_tokens" if by == "longest" else by
    if above is not None or below is not None:
        chosen &= selection.within(scored, score, above, below)
        say(f"select: {len(chosen)} of {len(names)} examples lie within the bounds of {score}")
    if not chosen:
        raise ValueError("keep: expected some example to be left, got none")
    if keep is not None:
        left = [at for at, name in enumerate(scored.examples) if name in chosen]
        part = selection.Scored(
            [scored.examples[at] for at in left],
            {k: v[left] for k, v in scored.columns.items()},
            scored.source,
        )
        count = selection.how_many(keep, len(left))
        if by == "random":
            chosen = set(selection.at_random(part.examples, count, seed=seed))
        else:
            found, missing = selection.by_score(part, score, take, count)
            chosen = set(found)
            if missing:
                say(f"select: {missing} examples have no {by} and could not be chosen")
    target = Path(out) if out is not None else Path(folder or ".") / "selected"
    if (target / selection.SELECTED).exists():
        say(f"select: {target} is written anew")
    selection.write_choice(scored, chosen, target)
    say(f"selected: {target / selection.SELECTED}")


def _scored_folder(folder: str) -> Scored:
    from sftmix.curation.selection import Scored
    from sftmix.run.inputs import train_source

    config, scores = open_scored(folder)
    return Scored(scores.examples, scores.columns, train_source(config))


def _scored_file(data: str, model: str | None, config: str | None, extra: list[str]) -> Scored:
    """The examples of a file with their lengths, which is all that is known without a scoring pass."""
    import numpy as np

    from sftmix.curation.selection import Scored
    from sftmix.run.inputs import prepared, settle_date, token_options, tokenizer_for, train_source

    if model is None:
        raise ValueError("model: expected one with --data, whose tokenizer counts tokens, got none")
    flags = ["run_dir=unset", f"data.train={data}", f"model.name={model}", *knob_flags(extra)]
    settled = settle_date(load_config(config_file(config), flags))
    with activity("reading and tokenising the examples"), tempfile.TemporaryDirectory() as place:
        tokenizer, options = tokenizer_for(settled, settled.model), token_options(settled, settled.model)
        store = prepared(settled, train_source(settled), tokenizer, options, Path(place))
        sizes = {name: store[name].num_supervised for name in store}
    names = sorted(sizes)
    lengths = np.array([sizes[name] for name in names], dtype=np.float64)
    return Scored(names, {"num_tokens": lengths}, train_source(settled))


def suspects(
    folder: Folder,
    limit: Annotated[int, typer.Option(help="how many are shown and written")] = 20,
    kind: Annotated[str, typer.Option(help="wrong, or saturated: known before training")] = "wrong",
    by: Annotated[
        str | None, typer.Option(help="score to go by; by default first_ifd, else first_nll")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="JSONL to write; by default suspects.jsonl in the folder")
    ] = None,
) -> None:
    """List the examples most likely wrong. Writes suspects.jsonl."""
    from sftmix.curation.suspects import find, order, table, write
    from sftmix.run.inputs import train_source

    if limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    config, scores = open_scored(folder)
    name, names = order(scores, by=by, kind=kind)
    without = len(scores.examples) - len(names)
    if without:
        say(f"suspects: {without} examples have no {name} and are not looked at")
    found = find(scores, train_source(config), names[:limit], name)
    show(table(found, name, kind))
    path = Path(out) if out is not None else Path(folder) / "suspects.jsonl"
    write(found, name, path)
    say(f"suspects: the first {len(found)} of {len(names)}, {path}")


def cartography(
    folder: Folder,
    out: Annotated[
        str | None, typer.Option(help="folder to write; by default cartography/ in the first")
    ] = None,
) -> None:
    """Write the scores as allenai/cartography's files."""
    from sftmix.scores.cartography import export

    _, scores = open_scored(folder)
    for path in export(scores, Path(out) if out is not None else Path(folder) / "cartography"):
        say(f"cartography: {path}")
