"""The command line on a terminal: help on one screen, completion in bash and zsh, nearest names, exit codes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sftmix.cli import app
from sftmix.config import describe
from sftmix.terminal import EXIT_CODES, KnobCommand

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PROGRAM = "import sys; sys.argv[0] = 'sftmix'; from sftmix.cli import main; main()"
# The test that shows each code, by the command as a user runs it.
CODES = {
    0: "test_cli.py::test_what_needs_no_torch_loads_none_and_writes_nothing",
    1: "test_doctor.py::test_the_command_ends_with_the_doctors_code",
    2: "run/test_stages.py::test_bad_input_is_one_line_and_exit_code_2",
    130: "run/test_faults.py::test_a_signal_ends_the_command_with_its_code_and_a_checkpoint",
    138: "run/test_faults.py::test_a_signal_ends_the_command_with_its_code_and_a_checkpoint",
    143: "run/test_faults.py::test_a_signal_ends_the_command_with_its_code_and_a_checkpoint",
}


def sftmix(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "LINES": "24", **environment}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=settings, timeout=60
    )


def bash_offers(line: str) -> list[str]:
    """What the TAB key offers in bash behind ``line``, whose last word is unfinished."""
    words = line.split(" ")
    done = sftmix(_SFTMIX_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen(command: str | None) -> None:
    """24 lines of 80 columns, nothing shortened; of all commands a line each and 11 beside, 40 at most."""
    most = 24 if command else min(40, max(24, 11 + len(COMMANDS)))
    done = sftmix(*([command] if command else []), "--help")
    lines = done.stdout.rstrip("\n").split("\n")
    assert done.returncode == 0 and lines[0].startswith("Usage: sftmix")
    assert len(lines) <= most and max(map(len, lines)) <= 80, "\n".join(lines)
    assert not any(line.endswith("...") for line in lines[1:])


def test_bash_completes_commands_flags_knobs_and_their_values() -> None:
    assert bash_offers("sftmix tr") == ["train"]
    assert bash_offers("sftmix run --dry") == ["--dry-run"]
    assert bash_offers("sftmix run --train.ep") == ["--train.epochs"]
    assert bash_offers("sftmix train folder --train.tuning l") == ["lora"]
    assert bash_offers("sftmix run --mixup.lam ") == ["pair", "token", "batch"]
    assert bash_offers("sftmix run --train.compile ") == ["true", "false"]
    assert bash_offers("sftmix run --train.epochs ") == []
    assert bash_offers("sftmix knobs --train.ep") == []


def test_every_knob_is_offered() -> None:
    offered = bash_offers("sftmix run --")
    assert {f"--{name}" for name, _, _ in describe()} <= set(offered) and len(set(offered)) == len(offered)


def test_zsh_completes_knobs_with_their_help() -> None:
    done = sftmix(_SFTMIX_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="sftmix run --mixup.al")
    (meaning,) = [text for name, _, text in describe() if name == "mixup.alpha"]
    assert done.returncode == 0 and '"--mixup.alpha"' in done.stdout and meaning in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_for_a_shell_is_one(shell: str, tmp_path: Path) -> None:
    done = sftmix(_SFTMIX_COMPLETE=f"source_{shell}")
    assert done.returncode == 0 and f"_SFTMIX_COMPLETE=complete_{shell}" in done.stdout
    program = shutil.which(shell)
    if program is not None:
        script = tmp_path / "script"
        script.write_text(done.stdout)
        assert subprocess.run([program, "-n", str(script)], timeout=60).returncode == 0


def test_bash_itself_completes_a_knob(tmp_path: Path) -> None:
    """The script in a real bash, with the program on its path: what TAB would put on the line."""
    program = tmp_path / "sftmix"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    script = sftmix(_SFTMIX_COMPLETE="source_bash").stdout
    line = (
        'COMP_WORDS=(sftmix run --train.ep); COMP_CWORD=2; _sftmix_completion sftmix; echo "${COMPREPLY[@]}"'
    )
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    settings = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [bash, "-c", f"{script}\n{line}"], capture_output=True, text=True, env=settings, timeout=60
    )
    assert done.stdout.strip() == "--train.epochs", done.stderr


def test_a_command_that_takes_knobs_completes_them() -> None:
    """One that was added without its class would take knobs and offer none."""
    for name, command in COMMANDS.items():
        takes = command.context_settings.get("ignore_unknown_options", False)
        assert isinstance(command, KnobCommand) == takes, name
    assert isinstance(COMMANDS["run"], KnobCommand)


@pytest.mark.parametrize("typed,meant", [("tarin", "train"), ("evalute", "evaluate"), ("recipe", "recipes")])
def test_an_unknown_command_names_the_nearest(typed: str, meant: str) -> None:
    done = sftmix(typed)
    assert done.returncode == 2 and f"No such command '{typed}'. Did you mean '{meant}'?" in done.stderr
    assert done.stdout == ""


def test_data_without_a_file_is_refused() -> None:
    done = sftmix("data")
    assert done.returncode == 2 and done.stderr.startswith("sftmix: file: expected what data.train takes")


def test_exit_codes_are_documented_in_one_place_and_shown_by_tests() -> None:
    page = (ROOT / "sftmix" / "README.md").read_text(encoding="utf-8")
    section = page.partition("## Exit codes\n")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, flags=re.MULTILINE)} == set(CODES)
    assert {int(code) for code in re.findall(r"\d+", EXIT_CODES)} == set(CODES)
    assert EXIT_CODES in sftmix("--help").stdout
    for code, test in CODES.items():
        path, _, function = test.partition("::")
        text = (ROOT / "tests" / "recipe" / path).read_text(encoding="utf-8")
        body = text.partition(f"def {function}(")[2]
        assert body, test
        assert code in (0, 1, 2) or re.search(rf"SIG\w+, {code}\b", text), (
            f"{test} does not send {code}'s signal"
        )
