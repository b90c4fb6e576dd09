"""What a command says at its end: what would be done, the answers, where the files are, and the closing table."""

from __future__ import annotations

from collections.abc import Sequence

from sftmix.config import Config, as_yaml
from sftmix.progress import say, show
from sftmix.run.folder import RunFolder


def show_plan(config: Config, stages: Sequence[str]) -> None:
    """The settings of a run as YAML, and what each stage would do; nothing is written."""
    print(as_yaml(config), end="", flush=True)
    record = RunFolder(config.run_dir).record()
    for stage in stages:
        state = record.get(stage, {}).get("state")
        say(f"{stage}: {'to do' if state is None else f'{state} before'}")
    say("dry run: nothing was written")


def show_files(run_dir: str) -> None:
    """Sample answers, and where a run's pictures and models are."""
    from sftmix.run.report import samples_table

    folder = RunFolder(run_dir)
    samples = samples_table(folder) if folder.evaluation.exists() else None
    if samples is not None:
        show(samples)
    for path in sorted(folder.plots.glob("*.png")):
        say(f"picture: {path}")
    if folder.report.exists():
        say(f"report: {folder.report}")
    for method in ("ntp", "sftmix"):
        if folder.model(method).exists():
            say(f"model ({method}): {folder.model(method)}")


def show_results(run_dir: str) -> None:
    """The closing tables of a run."""
    from sftmix.run.report import closing_tables

    folder = RunFolder(run_dir)
    for table in closing_tables(folder) if folder.evaluation.exists() else ():
        show(table)
