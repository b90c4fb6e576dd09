"""The table at the end of a run, from the run folder's files alone."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

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
