"""What nobody reads is said: other files in a run folder, leftovers of killed writes, variables, flags, YAML keys."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftmix.config import load_config
from sftmix.run.start import resolve
from sftmix.run.strays import leftovers, look, strays, tell_unread_variables
from tests.recipe.run.small import run, sftmix

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["model.name=m", "data.train=d", "model.dtype=float32"]


def test_a_finished_run_folder_holds_nothing_unknown(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert strays(finished) == [] and leftovers(finished) == []
    look(finished)
    assert capsys.readouterr().out == ""


def test_unknown_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "notes.txt", "train-sftmix/modle/x", "reference/point-000/x", "plots/mine.pdf",
                 ".hidden", "mine/train.jsonl", "mine.jinja"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    look(tmp_path, [tmp_path / "mine" / "train.jsonl", f"{tmp_path}/../{tmp_path.name}/mine.jinja"])
    said = capsys.readouterr().out
    assert "holds files that no stage reads: notes.txt, plots/mine.pdf, train-sftmix/modle" in " ".join(
        said.split()
    )


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.tex", "a.png", "b", "c", "d", "e", "f"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"run_dir: expected a new, an empty or a run folder, got .* and 2 more; take"
    ):
        resolve(str(tmp_path), None, FLAGS)
    with pytest.raises(ValueError, match=r"run_dir: expected a folder, got the file .*thesis.tex"):
        resolve(str(tmp_path / "thesis.tex"), None, FLAGS)
    assert sorted(tmp_path.iterdir()) == before
    resolve(str(tmp_path / "new"), None, FLAGS)
    (tmp_path / "empty").mkdir()
    resolve(str(tmp_path / "empty"), None, FLAGS)


def test_a_folder_with_only_the_files_of_its_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        f"run_dir: {tmp_path}\nmodel: {{name: m}}\ndata: {{train: {tmp_path}/t.jsonl}}\n"
    )
    (tmp_path / "t.jsonl").touch()
    assert resolve(str(tmp_path), tmp_path / "my.yaml", []).data.train == f"{tmp_path}/t.jsonl"


def test_leftovers_of_killed_writes_are_cleared_away_once_they_are_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [
        tmp_path / "train-sftmix" / ".model.tmp",
        tmp_path / "reference" / "checkpoints" / ".step-00000002.tmp",
    ]
    for folder in old:
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"x")
    file = tmp_path / ".config.yaml.a1b2.tmp"
    file.touch()
    long_ago = time.time() - 3600
    for path in [*old, *(folder / "weights.safetensors" for folder in old), file]:
        os.utime(path, (long_ago, long_ago))
    fresh = tmp_path / "train-ntp" / ".model.tmp"
    fresh.mkdir(parents=True)
    look(tmp_path)
    said = capsys.readouterr().out
    assert fresh.is_dir() and not any(path.exists() for path in [*old, file])
    assert "train-ntp/.model.tmp is being written, or was left by a killed write" in said.replace("\n", " ")
    assert "removed train-sftmix/.model.tmp, left by a killed write" in said
    os.utime(old[0].parent, (long_ago, long_ago))
    fresh.joinpath("weights.safetensors").write_bytes(
        b"x"
    )  # a large file being written: the folder's time stands still
    os.utime(fresh, (long_ago, long_ago))
    look(tmp_path)
    assert fresh.is_dir()


def test_variables_that_nothing_reads_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    tell_unread_variables({"SFTMIX_TRAIN_EPOCHS": "3", "sftmix_seed": "1", "PATH": "x", "MY_SFTMIX_X": "y"})
    assert "variables that nothing reads: SFTMIX_TRAIN_EPOCHS, sftmix_seed" in capsys.readouterr().out
    tell_unread_variables({"PATH": "x"})
    assert capsys.readouterr().out == ""


def test_the_program_reads_no_variable_that_it_calls_unread() -> None:
    for path in [*(ROOT / "sftmix").rglob("*.py"), *(ROOT / "sftmix_kernels").rglob("*.py")]:
        assert "SFTMIX_" not in path.read_text(encoding="utf-8").replace("SFTMIX_ ", "").replace(
            '"SFTMIX_"', ""
        ), path


def test_a_start_names_variables_flags_and_folders_that_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "run_dir: elsewhere\nmodel: {name: none-such}\ndata: {train: none.jsonl}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "sftmix", "run", "--config", tmp_path / "c.yaml", "--run-dir", tmp_path / "r",
         "--seed", "1", "--seed=2", "--data.train", "one.jsonl", "--data", "two.jsonl"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "SFTMIX_SEED": "3", "COLUMNS": "300"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = " ".join(done.stdout.split())
    assert "warning: seed is given more than once: 2 counts, not 1" in said
    assert "warning: data.train is given more than once: two.jsonl counts, not one.jsonl" in said
    assert "names the run folder elsewhere, which is not used" in said
    assert "variables that nothing reads: SFTMIX_SEED" in said
    assert not (tmp_path / "r" / "config.yaml").exists()


def test_two_run_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir: expected one run folder, got .*a and .*b"):
        resolve(str(tmp_path / "a"), None, [*FLAGS, f"--run_dir={tmp_path / 'b'}"])
    resolve(str(tmp_path / "a"), None, [*FLAGS, f"run_dir={tmp_path / 'x' / '..' / 'a'}"])


BASE = "run_dir: r\nmodel: {name: m}\ndata: {train: d}\n"
YAML: dict[str, tuple[str, str]] = {
    "unknown nested": (BASE + "train: {epochz: 1}", "train.epochz: unknown knob; did you mean train.epochs"),
    "unknown section": (BASE + "trian: {epochs: 1}", "trian: unknown knob; did you mean train"),
    "wrong type": (BASE + "train: {epochs: true}", "train.epochs: expected int, got True"),
    "list": (BASE + "train: {epochs: [1]}", r"train.epochs: expected int, got \[1\]"),
    "twice": (BASE + "seed: 1\nseed: 2", "seed: expected once, got it twice"),
    "twice nested": (BASE + "train: {epochs: 1, epochs: 2}", "epochs: expected once, got it twice"),
    "twice, dotted": (
        BASE + "train.epochs: 5\ntrain: {epochs: 4}",
        "train.epochs: expected once, got it twice",
    ),
    "merge key": (BASE + "train:\n  <<: {epochs: 3}", "expected a YAML file, got text that does not parse"),
    "tab": ("train:\n\tepochs: 1", "expected a YAML file, got text that does not parse: .*\n?.*"),
    "number as key": (BASE + "1: 2", "1: unknown knob"),
    "null as key": (BASE + "null: 2", "None: unknown knob"),
    "list as key": (BASE + "? [1]\n: 2", "expected a YAML file"),
    "empty": ("", "expected a YAML mapping of knobs, got NoneType"),
    "comment": ("# nothing", "expected a YAML mapping of knobs, got NoneType"),
    "list on top": ("- 1", "expected a YAML mapping of knobs, got list"),
    "empty section": (BASE + "train:", "train: expected a mapping of knobs, got None"),
    "deep": ("[" * 20000, "nested too deep"),
    "deep mappings": ("{a: " * 3000, "nested too deep"),
    "5,000 digits": (BASE + f"seed: {'1' * 5000}", "c.yaml: Exceeds the limit"),
    "no such day": (BASE + "seed: 2024-13-45", "c.yaml: month must be in 1..12"),
    "code": ("!!python/object:os.system x", "expected a YAML file"),
    "two documents": (BASE + "---\n" + BASE, "expected a YAML file"),
    "NUL": ("a\0b", "expected a YAML file"),
    "itself": ("&a [*a]", "expected a YAML mapping of knobs, got list"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_not_knobs_is_refused(name: str, tmp_path: Path) -> None:
    text, message = YAML[name]
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")


def test_anchors_and_unquoted_dates_mean_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: r\nmodel: {name: &m x}\nreference: {model: *m}\n"
                                     "data: {train: d, date: 2026-01-31}\n")  # fmt: skip
    config = load_config(tmp_path / "c.yaml")
    assert config.reference.model == "x" and config.data.date == "2026-01-31"


def test_a_warning_does_not_stop_the_run(finished: Path, material: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(finished, folder)
    (folder / "notes.txt").touch()
    sftmix("split", folder)
    run(material, folder)
    assert (folder / "notes.txt").exists()
