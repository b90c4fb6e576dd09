"""The tables at the end of a run, from the run folder's files alone."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from sftmix.evaluation.uncertainty import share
from sftmix.report.figures import COLUMNS, LABELS, result_row, title
from sftmix.run.folder import RunFolder, read_evaluation


def results_table(folder: RunFolder) -> Table:
    """One row per model: how it was trained and how it predicts the held-out answers.

    tokens: supervised tokens trained on; mixed: pairs of tokens mixed; seconds: of training steps; NLL: nats per
    token; accuracy: share of tokens that were the most likely one.
    """
    results = read_evaluation(folder.evaluation)
    table = Table(
        title=title(results),
        title_justify="left",
        show_edge=False,  # 80 columns, what a file or an old terminal has, hold it without cuts
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for label, figures in results.items():
        table.add_row(LABELS.get(label, label), *result_row(folder, label, figures))
    return table


def closing_tables(folder: RunFolder) -> list[Table]:
    """The tables that a run ends with: figures, how sure they are, and benchmarks where there are any."""
    tables = [results_table(folder), certainty_table(folder), tasks_table(folder)]
    return [table for table in tables if table is not None]


def certainty_table(folder: RunFolder) -> Table | None:
    """NLL and its differences with standard errors over examples, and the calibration error.

    ECE: expected calibration error of the most likely token. None where the figures have no errors: one example.
    """
    results = read_evaluation(folder.evaluation)
    if not any(figures.get("nll_stderr") is not None for figures in results.values()):
        return None
    table = Table(
        title="Standard errors over examples; differences on the same examples",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    others = [name for name in ("base", "ntp") if any(name in f.get("against", {}) for f in results.values())]
    for name in ("NLL", *(f"less {LABELS[other]}'s" for other in others), "ECE"):
        table.add_column(name, justify="right")
    for label, figures in results.items():
        shown = [_with_error(figures["nll"], figures.get("nll_stderr"))]
        for other in others:
            found = figures.get("against", {}).get(other)
            shown.append(_with_error(found["nll"], found["nll_stderr"], "+") if found else "–")
        calibration = figures.get("calibration")
        shown.append(f"{calibration['ece']:.2%}" if calibration else "–")
        table.add_row(LABELS.get(label, label), *shown)
    return table


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def tasks_table(folder: RunFolder) -> Table | None:
    """Benchmarks of every model, with standard errors; None if there are none.

    Where all rows are right or all are wrong the standard error is 0, and the end of the 95 % interval stands there.
    """
    results = read_evaluation(folder.evaluation)
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for label, figures in results.items():
        for task, found in figures.get("tasks", {}).items():
            of = found["num_rows"]
            counted = f"{found['num_examples']}" + (f" of {of}" if of != found["num_examples"] else "")
            for metric in found["metrics"]:
                chosen = [] if metric["filter"] == "none" else [metric["filter"]]
                name = " ".join([task, metric["metric"], *chosen])
                key = (name, counted, str(found["num_fewshot"]))
                rows.setdefault(key, {})[label] = share(metric, short=True)
    if not rows:
        return None
    table = Table(title="Benchmarks", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("task and metric", overflow="fold")
    for name in ("rows", "shots", *(LABELS.get(label, label) for label in results)):
        table.add_column(name, justify="right")
    for key, by_label in rows.items():
        table.add_row(*key, *(by_label.get(label, "–") for label in results))
    return table


def samples_table(folder: RunFolder) -> Table | None:
    """Sample answers of every model to the same prompts; None if there are none."""
    results = read_evaluation(folder.evaluation)
    if not any(figures.get("samples") for figures in results.values()):
        return None
    table = Table(title="Sample answers (greedy)", title_justify="left", show_lines=True)
    table.add_column("model", no_wrap=True)
    table.add_column("answer", overflow="fold")
    first = next(iter(results.values()))["samples"]
    for index, sample in enumerate(first):
        question = sample["prompt"].strip().splitlines()
        # The rendered prompt ends with the assistant's header; the question is the last line before it.
        text = next((line for line in reversed(question) if line.strip() not in ("assistant", "")), "")
        # Text, not str: a table would read "[x]" in a str as a style and drop it.
        table.add_row("question", Text(text), style="bold")
        table.add_row("expected", Text(sample["expected"]))
        for label, figures in results.items():
            answer = figures["samples"][index]
            cut = "" if answer.get("stopped", True) else " … (no end within evaluate.max_new_tokens)"
            table.add_row(LABELS.get(label, label), Text(f"{answer['answer']}{cut}"))
    return table
