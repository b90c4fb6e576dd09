"""The command line: ``sftmix run`` for everything, a command for each stage, ``sftmix demo``.

Every knob is a flag: ``--train.epochs 2`` (or ``--train.epochs=2``). Flags win over ``--config FILE``, which wins
over the run folder's config.yaml. Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sftmix.config import Config, as_yaml, describe, load_config
from sftmix.planning.command import plan
from sftmix.process import advice, prepare
from sftmix.progress import activity, say, show
from sftmix.recipes import config_file, recipes
from sftmix.run.folder import RESTARTS, stage_names
from sftmix.run.start import knob_flags, open_session, resolve
from sftmix.training.signals import Stopped, end_at_signals

app = typer.Typer(
    help="SFTMix instruction tuning. Every knob is a flag, e.g. --train.epochs 2; `sftmix knobs` lists them.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
KNOBS_AS_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=KNOBS_AS_FLAGS)(plan)


def _forms() -> str:
    """The forms of rows that are recognised, for the help of ``sftmix data``."""
    from sftmix.data.forms import forms_table

    rows = "\n\n".join(f"{name}: {columns}: {what}" for name, columns, what in forms_table())
    return "Forms of rows, and their columns (those that may be missing in brackets):\n\n" + rows.replace(
        "[", r"\["
    )


RunDir = Annotated[str, typer.Argument(help="run folder", show_default=False)]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="YAML file of knobs, or a recipe: `sftmix recipes` lists them")
]
Restart = Annotated[
    str | None,
    typer.Option(
        help=f"remove this stage's results and all later ones, to do them anew: {', '.join(RESTARTS)}"
    ),
]


def default_run_dir(data: str, model: str) -> str:
    """runs/<data>-<model>, from their last path parts."""
    stem = Path(data).name.split(".")[0]
    return str(Path("runs") / f"{stem}-{Path(model).name}")


@app.command(context_settings=KNOBS_AS_FLAGS)
def run(
    ctx: typer.Context,
    data: Annotated[str | None, typer.Option(help="training examples: a file or a datasets id")] = None,
    model: Annotated[
        str | None, typer.Option(help="model: a folder or a hub id; `demo` is the demo's")
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="run folder; by default runs/<data>-<model>")] = None,
    config: ConfigFile = None,
    baseline: Annotated[bool, typer.Option(help="also train plain NTP on the same batches")] = True,
    restart: Restart = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the settings and the stages, check them, write nothing")
    ] = False,
) -> None:
    """All stages: reference, score, split, train, evaluate, plot. Start it again to go on where it stopped."""
    chosen = config_file(config)
    extra = list(ctx.args)
    extra += [f"data.train={data}"] if data is not None else []
    extra += _model_flags(model)
    if run_dir is None:
        given = load_config(chosen, ["run_dir=unset", *knob_flags(extra)])
        run_dir = (
            given.run_dir
            if given.run_dir != "unset"
            else default_run_dir(given.data.train, model or given.model.name)
        )
    settled = resolve(run_dir, chosen, extra)
    method = settled.train.method
    methods = ("ntp", "sftmix") if baseline and method == "sftmix" else (method,)
    if dry_run:
        show_plan(settled, stage_names(methods))
        return
    session = open_session(settled, stage_names(methods), restart=restart)
    from sftmix.run import stages

    stages.run(session, methods)
    show_files(session.config.run_dir)
    show_results(session.config.run_dir)


def _model_flags(model: str | None) -> list[str]:
    if model is None:
        return []
    if model != "demo":
        return [f"model.name={model}"]
    from sftmix.demo.job import find_smollm2

    folder, gguf_file = find_smollm2()
    return [f"model.name={folder}", f"model.gguf_file={gguf_file}"]


def _stage(name: str, run_dir: str, config: str | None, extra: list[str], restart: str | None) -> Any:
    """Run one stage of a run folder; the session it ran in."""
    session = open_session(resolve(run_dir, config_file(config), extra), (name,), restart=restart)
    from sftmix.run import stages

    getattr(stages, name)(session)
    return session


@app.command(context_settings=KNOBS_AS_FLAGS)
def reference(
    ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None
) -> None:
    """Train the reference and save its weights at each scoring point."""
    _stage("reference", run_dir, config, ctx.args, restart)


@app.command(context_settings=KNOBS_AS_FLAGS)
def score(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Score every training example at each scoring point: dynamics.parquet."""
    _stage("score", run_dir, config, ctx.args, restart)


@app.command(context_settings=KNOBS_AS_FLAGS)
def split(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Cut the examples at their median confidence: split.parquet."""
    _stage("split", run_dir, config, ctx.args, restart)


@app.command(context_settings=KNOBS_AS_FLAGS)
def train(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Train with SFTMix (or --train.method ntp) and export the model. Also under torchrun."""
    settled = resolve(run_dir, config_file(config), ctx.args)
    session = open_session(settled, (f"train-{settled.train.method}",), restart=restart)
    from sftmix.run import stages

    stages.train(session, session.config.train.method)
    say(f"model: {session.folder.model(session.config.train.method)}")


@app.command(context_settings=KNOBS_AS_FLAGS)
def evaluate(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Held-out figures, sample answers, benchmarks and answers of the base and the trained models."""
    _stage("evaluate", run_dir, config, ctx.args, restart)
    show_files(run_dir)
    show_results(run_dir)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for a bug report")] = False,
) -> None:
    """Check this machine: versions, device, limits, and the loss against its specification. 1 if something is wrong."""
    from sftmix.doctor import diagnose

    raise typer.Exit(diagnose(as_json=as_json))


@app.command("data", context_settings=KNOBS_AS_FLAGS, epilog=_forms())
def data_command(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="what data.train takes: a file, folder, glob, datasets id")],
    model: Annotated[
        str | None, typer.Option(help="model whose tokenizer and chat template are used")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object a line: the account, examples")
    ] = False,
    limit: Annotated[int, typer.Option(help="examples to show")] = 3,
    config: ConfigFile = None,
) -> None:
    """What would become of a data set: rows, tokens, the first examples. Ends with 2 if a run would refuse it."""
    flags = [f"data.train={file}", *_model_flags(model), *knob_flags(ctx.args)]
    resolved = load_config(config_file(config), ["run_dir=unset", *flags])
    if limit < 0:
        raise ValueError(f"limit: expected at least 0, got {limit}")
    from sftmix.run.inspection import inspect_data

    inspect_data(resolved, limit=limit, as_json=as_json)


@app.command(context_settings=KNOBS_AS_FLAGS)
def plot(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Draw the data map, the loss curves and the confidence histogram."""
    session = open_session(resolve(run_dir, config_file(config), ctx.args), ("plot",), restart=restart)
    from sftmix.run import stages

    for path in stages.plot(session):
        say(path)


@app.command(context_settings=KNOBS_AS_FLAGS)
def demo(
    ctx: typer.Context,
    run_dir: Annotated[str, typer.Option(help="run folder")] = "runs/demo",
    minutes: Annotated[float, typer.Option(help="time limit; decides how many examples are used")] = 5.0,
    restart: Restart = None,
) -> None:
    """Fine-tune SmolLM2-135M with SFTMix on questions about Python's standard library."""
    started, flags = time.perf_counter(), knob_flags(ctx.args)
    say(
        "demo: SmolLM2-135M-Instruct learns, with SFTMix, to answer questions about Python's standard library"
    )
    with activity("at work on the demo"):
        from sftmix.demo import job as demo

        config = demo.run(run_dir, minutes=minutes, flags=flags, restart=restart)
        from sftmix.run.folder import RunFolder

        show_files(run_dir)
        say(demo.total(started))
        show_results(run_dir)
        for sentence in demo.closing(RunFolder(run_dir), config):
            say(sentence)


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes: settings to begin with, for --config."""
    from rich.table import Table

    table = Table("recipe", "what it is for")
    for name, purpose in recipes().items():
        table.add_row(name, purpose)
    show(table)


@app.command()
def knobs() -> None:
    """List every knob with its default and meaning."""
    from rich.table import Table

    table = Table("knob", "default", "meaning")
    for name, default, meaning in describe():
        table.add_row(name, str(default), meaning)
    show(table)


def show_plan(config: Config, stages: Sequence[str]) -> None:
    """The settings of a run as YAML, and what each stage would do; nothing is written."""
    from sftmix.run.folder import RunFolder

    print(as_yaml(config), end="", flush=True)
    record = RunFolder(config.run_dir).record()
    for stage in stages:
        state = record.get(stage, {}).get("state")
        say(f"{stage}: {'to do' if state is None else f'{state} before'}")
    say("dry run: nothing was written")


def show_files(run_dir: str) -> None:
    """Sample answers, and where a run's pictures and models are."""
    from sftmix.run.folder import RunFolder
    from sftmix.run.report import samples_table

    folder = RunFolder(run_dir)
    samples = samples_table(folder) if folder.evaluation.exists() else None
    if samples is not None:
        show(samples)
    for path in sorted(folder.plots.glob("*.png")):
        say(f"picture: {path}")
    for method in ("ntp", "sftmix"):
        if folder.model(method).exists():
            say(f"model ({method}): {folder.model(method)}")


def show_results(run_dir: str) -> None:
    """The closing tables of a run."""
    from sftmix.run.folder import RunFolder
    from sftmix.run.report import closing_tables

    folder = RunFolder(run_dir)
    for table in closing_tables(folder) if folder.evaluation.exists() else ():
        show(table)


def main() -> None:
    """Entry point: bad input becomes one line, or a line a fault, and exit code 2.

    So does what the machine refuses: a full disk, a file that may not be read or written, a package that is missing.
    Ctrl-C ends with 130, SIGTERM with 143, SIGUSR1 with 138, training and scoring after they have saved.
    """
    prepare()
    end_at_signals()
    try:
        app()
    except ValueError as error:
        listed = [" ".join(line.split()) for line in str(error).split("\n  ")]
        print("sftmix: " + "\n  ".join(listed), file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"sftmix: {stopped}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("sftmix: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `sftmix knobs | head` has read enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        refused = advice(error)
        if refused is None:  # a fault of ours: its traceback is wanted
            raise
        print(f"sftmix: {refused}", file=sys.stderr)
        sys.exit(2)
