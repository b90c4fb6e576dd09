"""The README is true: its Python runs, its commands and files exist, and it names two make targets."""

from __future__ import annotations

import re
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# Commands stand in indented blocks; prose names them between backticks.
COMMANDS = re.findall(r"^    (\S.*)$", README, flags=re.MULTILINE)
NAMED = re.findall(r"`([^`\n]+)`", README)


def help_of(*command: str) -> str:
    """The help of a sub-command, wide enough that nothing is folded."""
    from typer.testing import CliRunner

    from sftmix.cli import app

    result = CliRunner().invoke(
        app, [*command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1])
def test_python_block_runs(block: str, monkeypatch: Any) -> None:
    if shutil.which("g++") is None and not torch.cuda.is_available():
        monkeypatch.setattr(
            torch, "compile", partial(torch.compile, backend="aot_eager")
        )  # no C++ compiler here
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_loss_example_has_the_gradients_it_speaks_of() -> None:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert names["hidden"].grad.shape == (10, 64)
    assert names["weight"].grad.shape == (1000, 64)
    assert names["out"].nll.shape == (10,)
    assert names["out"].mixup_nll.shape == (4,)


def test_two_make_targets_are_named_and_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", " ".join(COMMANDS + NAMED)))
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert named == {"demo", "test"}
    assert named <= targets


def test_every_module_named_exists() -> None:
    modules = re.findall(r"-m ([\w.]+)", " ".join(COMMANDS + NAMED))
    assert {"bench.report", "bench.gpu", "sftmix"} <= set(modules)
    assert [name for name in modules if find_spec(name) is None] == []


def test_every_path_named_exists() -> None:
    paths = {
        name for name in NAMED if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and ("/" in name or "." in name)
    }
    paths = {path for path in paths if path.startswith(("bench/", "tests/", "sftmix", "constraints"))}
    assert "constraints.txt" in paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_stages_named_are_sub_commands_with_their_options() -> None:
    from sftmix.config import describe

    knobs = {name for name, *_ in describe()}
    overview = help_of()
    rows = re.findall(
        r"^\| `([a-z]+)` \|", README.partition("## The recipe")[2].partition("## ")[0], flags=re.M
    )
    assert rows == ["reference", "score", "split", "train", "evaluate", "plot"]
    for name in [*rows, "run", "demo", "knobs"]:
        assert re.search(rf"\b{name}\b", overview), f"sftmix has no command {name}"
    lines = [command for command in COMMANDS if re.search(r"\bsftmix [a-z]+", command)]
    assert lines
    for line in lines:
        (name,) = re.findall(r"\bsftmix ([a-z]+)", line)
        text = help_of(name)
        for option in re.findall(r"--([\w.-]+)", line.split("sftmix " + name)[1]):
            assert option in knobs or f"--{option}" in text, f"sftmix {name} has no --{option}"
