"""The README is short and true: its parts are there, its Python runs, its commands and files exist."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import sftmix_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# Pages for users; those for developers are held to less (tests/test_pages.py).
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "sftmix/README.md", "sftmix_kernels/README.md", "bench/README.md")
}
README = PAGES["README.md"]
BLOCKS = [
    block
    for text in PAGES.values()
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
]
# Commands stand in indented blocks; prose names them between backticks.
COMMANDS = [line for text in PAGES.values() for line in re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)]
NAMED = [name for text in PAGES.values() for name in re.findall(r"`([^`\n]+)`", text)]
# What the README must have, in this order; "" is what stands before the first heading of that level.
PARTS = {
    "": (r"\*\*For whom\.\*\*", r"\*\*Compared to what\.\*\*", r"\$\$L = ", r"arXiv 2410\.05248"),
    "Run it": (r"^    make demo$", r"^    make test$", r"<!-- demo: ", r"<!-- end of demo -->"),
    "Use the loss": (r"sftmix_loss\(", r"\.backward\(\)", r"torch\.compile\(.*fullgraph=True"),
    "How two matrix products give three losses": (r"X = λA \+ \(1−λ\)B", r"no third product"),
    "The recipe": (r"^    sftmix run --data FILE --model ID$", r"KNOBS\.md"),
    "In a TRL script": (
        r"import SFTMixConfig, SFTMixTrainer",
        r'reference="online"',
        r"TrainingDynamicsCallback",
    ),
    "Measured": (
        r"<!-- summary: ",
        r"<!-- end of summary -->",
        r"AVX2",
        r"AVX-512-BF16",
        r"bench/RESULTS\.md",
    ),
    "What the paper reports, and what is shown here": (
        r"Llama-3\.1-8B",
        r"\*\*Shown here\*\*",
        r"\*\*Not shown here\*\*",
    ),
    "Limits": (r"^- ",),
    "Where the rest is": (
        r"sftmix_kernels/README\.md",
        r"bench/README\.md",
        r"@article",
        r"^Licence: .*Apache-2\.0",
    ),
}


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


def test_the_readme_is_read_to_the_end() -> None:
    assert len(README.splitlines()) <= 200


def test_the_readme_has_its_parts() -> None:
    sections = dict(
        re.findall(r"(?:\A|^## ([^\n]*)$)(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    )
    assert list(sections) == list(PARTS)
    missing = [
        (title, pattern)
        for title, patterns in PARTS.items()
        for pattern in patterns
        if not re.search(pattern, sections[title], flags=re.MULTILINE)
    ]
    assert missing == []


def test_the_first_screen_says_for_whom_and_compared_to_what() -> None:
    screen = "\n".join(README.splitlines()[:16])
    assert "**For whom.**" in screen and "**Compared to what.**" in screen


def test_code_examples_are_about_ten_lines() -> None:
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    named = [
        name.strip()
        for group in re.findall(r"'\.\[([\w,\s-]+)\]'", "\n".join(NAMED))
        for name in group.split(",")
    ]
    assert named and set(named) <= set(extras)


def test_loss_example_has_the_gradients_it_speaks_of() -> None:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert names["hidden"].grad.shape == (10, 64)
    assert names["weight"].grad.shape == (1000, 64)
    assert names["out"].nll.shape == (10,)
    assert names["out"].mixup_nll.shape == (4,)


def test_the_page_of_the_loss_names_every_public_name_and_argument_and_no_other() -> None:
    page = PAGES["sftmix_kernels/README.md"]
    named = set(re.findall(r"`(\w+)[`=]", page))
    functions = (sftmix_kernels.sftmix_loss, sftmix_kernels.linear_cross_entropy, sftmix_kernels.token_stats)
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    fields = {*sftmix_kernels.SFTMixLoss._fields, *sftmix_kernels.TokenStats._fields}
    assert (set(sftmix_kernels.__all__) | arguments | fields) - named == set()
    table = page.partition("| argument |")[2].partition("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name for cell in first for name in re.findall(r"`(\w+)", cell)} <= arguments


def test_two_make_targets_are_named_and_exist() -> None:
    own = [*re.findall(r"^    (\S.*)$", README, flags=re.MULTILINE), *re.findall(r"`([^`\n]+)`", README)]
    named = set(re.findall(r"\bmake ([a-z]+)", " ".join(own)))
    everywhere = set(re.findall(r"\bmake ([a-z]+)", " ".join(COMMANDS + NAMED)))
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert named == {"demo", "test"}
    assert everywhere <= targets


def test_every_module_named_exists() -> None:
    modules = re.findall(r"-m ([\w.]+)", " ".join(COMMANDS + NAMED))
    assert {"bench.report", "bench.gpu", "sftmix"} <= set(modules)
    assert [name for name in modules if find_spec(name) is None] == []


def test_every_path_named_exists() -> None:
    paths = {
        name for name in NAMED if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and ("/" in name or "." in name)
    }
    paths = {
        path
        for path in paths
        if path.startswith(("bench/", "tests/", "sftmix/", "sftmix_kernels/", "constraints"))
    }
    assert "constraints.txt" in paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_stages_named_are_sub_commands_with_their_options() -> None:
    from sftmix.config import describe

    knobs = {name for name, *_ in describe()}
    overview = help_of()
    stages = PAGES["sftmix/README.md"].partition("## Stages")[2].partition("## ")[0]
    rows = re.findall(r"^\| `([a-z]+)` \|", stages, flags=re.M)
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
