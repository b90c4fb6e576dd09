"""The command line: ``sftmix run`` for everything, a command for each stage, ``sftmix demo``.

Every knob is a flag: ``--train.epochs 2`` (or ``--train.epochs=2``). Flags win over ``--config FILE``, which wins
over the run folder's config.yaml. Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sftmix.config import load_config
from sftmix.curation.command import cartography, leading, score_file, select, suspects
from sftmix.planning.command import plan
from sftmix.process import advice, prepare
from sftmix.progress import activity, say
from sftmix.recipes import config_file
from sftmix.report.command import compare
from sftmix.run.closing import show_files, show_plan, show_results
from sftmix.run.folder import RESTARTS, stage_names
from sftmix.run.start import knob_flags, open_session, resolve
from sftmix.terminal import EXIT_CODES, Commands, KnobCommand, list_forms, list_knobs, list_recipes
from sftmix.training.signals import Stopped, end_at_signals

app = typer.Typer(
    cls=Commands, help="SFTMix instruction tuning. Every knob is a flag; `sftmix knobs` lists them.",
    epilog=EXIT_CODES, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
KNOBS_AS_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

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


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
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


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def reference(
    ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None
) -> None:
    """Train the reference, saving weights at each scoring point."""
    _stage("reference", run_dir, config, ctx.args, restart)


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS, options_metavar="[RUN_DIR] [OPTIONS]")
def score(
    ctx: typer.Context,
    data: Annotated[str | None, typer.Option(help="score this file alone, without a run folder")] = None,
    model: Annotated[list[str] | None, typer.Option(help="with --data: one or more checkpoints, or `demo`")] = None,
    out: Annotated[str | None, typer.Option(help="with --data: folder to write; by default one in scores/")] = None,
    ifd: Annotated[bool, typer.Option(help="with --data: also without the prompts, for IFD")] = True,
    config: ConfigFile = None, restart: Restart = None,
) -> None:  # fmt: skip
    """Score every example of RUN_DIR, or of --data FILE."""
    run_dir, flags = leading(ctx.args)
    if (run_dir is None) == (data is None):
        raise ValueError(
            f"run_dir: expected a run folder or --data, got {'neither' if data is None else 'both'}"
        )
    if run_dir is not None:
        if model or out:
            raise ValueError(f"{'model' if model else 'out'}: expected none beside a run folder, got one")
        _stage("score", run_dir, config, flags, restart)
        return
    if model == ["demo"]:
        named = _model_flags("demo")
        model, flags = [named[0].removeprefix("model.name=")], [*named, *flags]
    score_file(str(data), model or [], out, ifd=ifd, config=config, extra=flags)


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def split(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Cut the examples at their median confidence: split.parquet."""
    _stage("split", run_dir, config, ctx.args, restart)


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def train(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Train with SFTMix (or --train.method ntp), then export. Also under torchrun."""
    settled = resolve(run_dir, config_file(config), ctx.args)
    session = open_session(settled, (f"train-{settled.train.method}",), restart=restart)
    from sftmix.run import stages

    stages.train(session, session.config.train.method)
    say(f"model: {session.folder.model(session.config.train.method)}")


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def evaluate(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Held-out figures, sample answers, benchmarks of all models."""
    _stage("evaluate", run_dir, config, ctx.args, restart)
    show_files(run_dir)
    show_results(run_dir)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for a bug report")] = False,
) -> None:
    """Check this machine, and the loss against its specification. Ends with 1 if something is wrong."""
    from sftmix.doctor import diagnose

    raise typer.Exit(diagnose(as_json=as_json))


@app.command("data", cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def data_command(
    ctx: typer.Context,
    file: Annotated[
        str | None, typer.Argument(help="what data.train takes: a file, folder, glob, datasets id")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="model whose tokenizer and chat template are used")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object a line: the account, examples")
    ] = False,
    limit: Annotated[int, typer.Option(help="examples to show")] = 3,
    config: ConfigFile = None,
    forms: Annotated[bool, typer.Option("--forms", help="list the forms of rows and their columns")] = False,
) -> None:
    """What would become of a data set: rows, tokens, examples. Ends with 2 if a run would refuse it."""
    if forms:
        list_forms()
        return
    if file is None:
        raise ValueError("file: expected what data.train takes, or --forms, got nothing")
    flags = [f"data.train={file}", *_model_flags(model), *knob_flags(ctx.args)]
    resolved = load_config(config_file(config), ["run_dir=unset", *flags])
    if limit < 0:
        raise ValueError(f"limit: expected at least 0, got {limit}")
    from sftmix.run.inspection import inspect_data

    inspect_data(resolved, limit=limit, as_json=as_json)


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def plot(ctx: typer.Context, run_dir: RunDir, config: ConfigFile = None, restart: Restart = None) -> None:
    """Draw data map, curves and histogram, and write report.html."""
    session = open_session(resolve(run_dir, config_file(config), ctx.args), ("plot",), restart=restart)
    from sftmix.run import stages

    for path in stages.plot(session):
        say(path)


@app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)
def demo(
    ctx: typer.Context,
    run_dir: Annotated[str, typer.Option(help="run folder")] = "runs/demo",
    minutes: Annotated[float, typer.Option(help="time limit; decides how many examples are used")] = 5.0,
    restart: Restart = None,
) -> None:
    """Fine-tune SmolLM2-135M on questions about Python's library. With SFTMix, in minutes, on a CPU."""
    started, flags = time.perf_counter(), knob_flags(ctx.args)
    say("demo: SmolLM2-135M-Instruct learns, with SFTMix, to answer questions on Python's standard library")
    with activity("at work on the demo"):
        from sftmix.demo import job as demo

        config = demo.run(run_dir, minutes=minutes, flags=flags, restart=restart)
        from sftmix.run.folder import RunFolder

        show_files(run_dir)
        say(demo.total(started))
        show_results(run_dir)
        for sentence in demo.closing(RunFolder(run_dir), config):
            say(sentence)


app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS)(plan)
app.command(cls=KnobCommand, context_settings=KNOBS_AS_FLAGS, options_metavar="[FOLDER] [OPTIONS]")(select)
app.command()(compare)
app.command()(suspects)
app.command()(cartography)
app.command("recipes")(list_recipes)
app.command("knobs")(list_knobs)


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
