"""The closing tables print what the files hold, character for character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from sftmix.run.folder import RunFolder
from sftmix.run.report import samples_table


def sample(answer: str, **more: Any) -> dict[str, Any]:
    return {
        "id": "a",
        "prompt": "Is [bold]x[/bold] a [link]?",
        "answer": answer,
        "expected": "a[0] or [/b]",
        **more,
    }


def test_brackets_in_texts_are_printed_and_answers_without_an_end_say_so(tmp_path: Path) -> None:
    figures = {"nll": 1.0, "num_examples": 1}
    results = {
        "base": {**figures, "samples": [sample("x[red]y", stopped=True)]},
        "ntp": {**figures, "samples": [sample("on and on", stopped=False)]},
        "sftmix": {**figures, "samples": [sample("from an older version")]},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    table = samples_table(RunFolder(tmp_path))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    for wanted in ("Is [bold]x[/bold] a [link]?", "a[0] or [/b]", "x[red]y ", "from an older version "):
        assert wanted in text
    assert "on and on … (no end within evaluate.max_new_tokens)" in text and text.count("no end") == 1
