"""The table of features is true: its tests and arguments exist, and FEATURES.md holds what the command writes."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sftmix_kernels
from bench import features as listed
from bench.features import BEGIN, DATA, END, PAGE, read_features, sources, table
from bench.report import rewritten

ROOT = Path(__file__).resolve().parent.parent
FEATURES = read_features()
TESTS = sorted({test for row in FEATURES.rows for test in row.tests})
# DESIGN's rows: a table that loses one says less than it should.
REQUIRED = (
    "any upstream, weights of rows, label smoothing, z-loss, softcap, logit scale, bias, float32, "
    "log-sum-exp of each row, entropy and top-1, row statistics, frozen, double backward, no logits in memory, "
    "bounded, vocabulary-parallel, LoRA, autocast, fullgraph, dynamic shapes, export, "
    "host synchronisation, bitwise equal, ragged, AMD, CPU, Mixup"
).split(", ")


def functions_of(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("test", TESTS)
def test_a_named_test_exists(test: str) -> None:
    path, _, function = test.partition("::")
    assert function in functions_of(path)


@pytest.mark.slow
def test_named_tests_are_collected() -> None:
    """With the GPU hidden: some files are skipped whole where there is one."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout[-2000:] + collected.stderr[-2000:]
    found = {line.split("[")[0] for line in collected.stdout.splitlines() if "::" in line}
    assert sorted(set(TESTS) - found) == []


@pytest.mark.parametrize("name", sorted({name for row in FEATURES.rows for name in row.arguments}))
def test_a_named_argument_is_public(name: str) -> None:
    """``function.parameter`` or ``result.field``."""
    owner, _, member = name.partition(".")
    assert owner in sftmix_kernels.__all__
    value: Any = getattr(sftmix_kernels, owner)
    members = value._fields if hasattr(value, "_fields") else inspect.signature(value).parameters
    assert member in members


def test_the_page_holds_what_the_command_writes() -> None:
    current = PAGE.read_text(encoding="utf-8")
    assert rewritten(current, table(FEATURES), BEGIN, END) == current, "run `python -m bench.features`"


def test_the_rows_asked_for_are_there() -> None:
    names = [row.name for row in FEATURES.rows]
    assert len(set(names)) == len(names)
    assert [words for words in REQUIRED if not any(words in name for name in names)] == []
    assert list(FEATURES.versions) == ["QuACK", "Liger", "CCE", "torch", "TRL"]


def test_what_partly_means_is_said_and_sources_name_every_cell() -> None:
    text, where = table(FEATURES), sources(FEATURES)
    for row in FEATURES.rows:
        for name, answer in (("ours", row.ours), *row.peers.items()):
            if answer.value == "partly":
                assert answer.note and f"{name}: {answer.note.split(' (')[0]}" in text
        assert all(
            f"    {peer}: {answer.value}: {answer.note}" in where for peer, answer in row.peers.items()
        )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"ours": ["perhaps", ""]}, "expected one of yes, partly, no, [?], got 'perhaps'"),
        ({"tests": []}, "expected the tests that show it, got none"),
        ({"peers": {"QuACK": ["no", "file"]}}, "expected the peers"),
    ],
)
def test_a_bad_row_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads(DATA.read_text(encoding="utf-8"))
    content["features"][0].update(change)
    path = tmp_path / "features.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_features(path)


def test_an_answer_without_a_source_is_refused(tmp_path: Path) -> None:
    content = json.loads(DATA.read_text(encoding="utf-8"))
    content["features"][0]["peers"]["TRL"] = ["no", ""]
    path = tmp_path / "features.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected where each answer was read"):
        read_features(path)


def test_check_sees_a_page_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    copy = tmp_path / "FEATURES.md"
    copy.write_text(PAGE.read_text(encoding="utf-8").replace("| softcap | yes |", "| softcap | no |"))
    monkeypatch.setattr(listed, "PAGE", copy)
    assert listed.main(["--check"]) == 1 and "python -m bench.features" in capsys.readouterr().err
    assert listed.main([]) == 0 and listed.main(["--check"]) == 0
