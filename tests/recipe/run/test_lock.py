"""Two programs in one run folder: the second is refused, and one that was killed holds nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftmix.run import session
from tests.recipe.run.small import run

HOLDING = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_the_second_of_two_is_refused_and_a_killed_one_holds_nothing(
    finished: Path, material: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder / "evaluation.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    command = [sys.executable, "-c", HOLDING, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match="expected a run folder that no other program works in, got one in use"
        ):
            run(material, folder)
        assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
            path: time for path, time in before.items() if path.is_file()
        }
        other.kill()
    run(material, folder)
    assert (folder / "evaluation.json").exists()


def test_a_folder_that_cannot_be_locked_is_said_and_used(
    finished: Path, material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Some network file systems have no locks."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(38, "Function not implemented")

    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder / "evaluation.json").unlink()
    monkeypatch.setattr(session.FileLock, "acquire", refuse)
    run(material, folder)
    assert (folder / "evaluation.json").exists() and "cannot be locked" in capfd.readouterr().out
