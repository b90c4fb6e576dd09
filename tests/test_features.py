"""The tables of features are true: tests and arguments exist, and the pages hold what the command writes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import sftmix_kernels
from bench import features as listed
from bench.evidence import digest, distributions, faults, read_place
from bench.features import BEGIN, END, LISTS, LOSSES, TRAINERS, Listing, read_features, sources, table
from bench.report import rewritten
from sftmix.config import describe

ROOT = Path(__file__).resolve().parent.parent
FEATURES, RECIPE = read_features(LOSSES.data), read_features(TRAINERS.data)
NAMED = {test for features in (FEATURES, RECIPE) for row in features.rows for test in row.tests}
TESTS = sorted(name for name in NAMED if "::" in name)
# DESIGN's rows: a table that loses one says less than it should.
REQUIRED = (
    "any upstream, weights of rows, label smoothing, z-loss, softcap, logit scale, bias, float32, "
    "log-sum-exp of each row, entropy and top-1, row statistics, frozen, double backward, no logits in memory, "
    "bounded, vocabulary-parallel, LoRA, autocast, fullgraph, dynamic shapes, export, "
    "host synchronisation, bitwise equal, ragged, AMD, CPU, Mixup"
).split(", ")
# What somebody who chooses a trainer asks for, also where the answer is no.
REQUIRED_OF_TRAINERS = (
    "Mixup, scores of every example, data map, reinforcement, images, never stored, "
    "dropped before the head, chat template, bad rows, held-out examples, packed documents, "
    "padding left out, LoRA, QLoRA, fp8, mixture of experts, GGUF, export, FSDP2, tied embedding, HSDP, "
    "never gathered, tensor parallelism, pipeline parallelism, context parallelism, several nodes, "
    "figures of whole runs, same bits, number of processes, checksums, SIGTERM, not finite, "
    "config.json alone, dry run, unknown setting, held-out figures, benchmarks, hub, web page, "
    "package index"
).split(", ")


def functions_of(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("test", TESTS)
def test_a_named_test_exists(test: str) -> None:
    path, _, function = test.partition("::")
    assert function in functions_of(path)


def test_a_named_file_exists() -> None:
    assert [name for name in NAMED if "::" not in name and not (ROOT / name).is_file()] == []


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


def test_a_named_knob_is_one() -> None:
    knobs = {name for name, _, _ in describe()}
    assert {name for row in RECIPE.rows for name in row.arguments} - knobs == set()


@pytest.mark.parametrize("listing", LISTS, ids=lambda listing: listing.page.name)
def test_the_page_holds_what_the_command_writes(listing: Listing) -> None:
    current = listing.page.read_text(encoding="utf-8")
    text = table(read_features(listing.data))
    assert rewritten(current, text, BEGIN, END) == current, "run `python -m bench.features`"


@pytest.mark.parametrize("features,required", [(FEATURES, REQUIRED), (RECIPE, REQUIRED_OF_TRAINERS)])
def test_the_rows_asked_for_are_there(features: Any, required: list[str]) -> None:
    names = [row.name for row in features.rows]
    assert len(set(names)) == len(names)
    assert [words for words in required if not any(words in name for name in names)] == []


def test_the_peers_are_those_asked_for() -> None:
    assert list(FEATURES.versions) == ["QuACK", "Liger", "CCE", "torch", "TRL"]
    assert list(RECIPE.versions) == ["TRL", "axolotl", "LLaMA-Factory", "Unsloth", "torchtitan"]


def test_where_a_trainer_of_ours_is_worse_is_said() -> None:
    """A table in which every row of ours is a yes would be an advertisement."""
    worse = [
        row
        for row in RECIPE.rows
        if row.ours.value == "no" and "yes" in [a.value for a in row.peers.values()]
    ]
    assert len(worse) >= 15 and all(f"| {row.name} | no |" in table(RECIPE) for row in worse)


@pytest.mark.parametrize("features", [FEATURES, RECIPE], ids=["losses", "trainers"])
def test_what_partly_means_is_said_and_sources_name_every_cell(features: Any) -> None:
    text, where = table(features), sources(features)
    for row in features.rows:
        for name, answer in (("ours", row.ours), *row.peers.items()):
            if answer.value == "partly":
                said = answer.note if answer.places else answer.note.split(" (")[0]
                assert said and f"{name}: {said}" in text
        for peer, answer in row.peers.items():
            lines = [f"    {peer}: {answer.value}" + (f": {answer.note}" if answer.note else "")]
            assert "\n".join([*lines, *(f"        {place}" for place in answer.places)]) in where


@pytest.mark.parametrize(
    "change,message",
    [
        ({"ours": ["perhaps", ""]}, "expected one of yes, partly, no, [?], got 'perhaps'"),
        ({"tests": []}, "expected the tests that show it, got none"),
        ({"peers": {"QuACK": ["no", "file"]}}, "expected the peers"),
    ],
)
def test_a_bad_row_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads(LOSSES.data.read_text(encoding="utf-8"))
    content["features"][0].update(change)
    path = tmp_path / "features.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_features(path)


def test_an_answer_without_a_source_is_refused(tmp_path: Path) -> None:
    content = json.loads(LOSSES.data.read_text(encoding="utf-8"))
    content["features"][0]["peers"]["TRL"] = ["no", ""]
    path = tmp_path / "features.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected where each answer was read"):
        read_features(path)


def test_check_sees_a_page_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    copy = tmp_path / "FEATURES.md"
    copy.write_text(LOSSES.page.read_text(encoding="utf-8").replace("| softcap | yes |", "| softcap | no |"))
    monkeypatch.setattr(listed, "LISTS", (Listing(LOSSES.data, copy), TRAINERS))
    assert listed.main(["--check"]) == 1 and "python -m bench.features" in capsys.readouterr().err
    assert listed.main([]) == 0 and listed.main(["--check"]) == 0


def test_every_place_was_looked_up() -> None:
    """A place that was changed since, or a version, has another digest: run ``--verify`` again."""
    assert RECIPE.verified is not None and re.fullmatch(r"20\d\d-\d\d-\d\d", RECIPE.verified["date"])
    assert RECIPE.verified["digest"] == digest(RECIPE.places, RECIPE.versions)


def test_what_is_said_of_trl_stands_in_the_installed_one() -> None:
    named = distributions(RECIPE.versions["TRL"])
    if importlib.util.find_spec("trl") is None or any(
        metadata.version(name) != named[name] for name in named
    ):
        pytest.skip("trl and what it stands on are not installed in the versions of the table")
    folder = Path(str(metadata.distribution("trl").locate_file("")))
    assert faults("TRL", RECIPE.versions["TRL"], RECIPE.places["TRL"], [folder]) == []


def test_arguments_said_of_trls_configuration_are_its_fields() -> None:
    if importlib.util.find_spec("trl") is None or metadata.version("trl") != "1.16.0":
        pytest.skip("trl 1.16.0 is not installed")
    from trl import SFTConfig

    names = {field.name for field in fields(SFTConfig)}
    places = [read_place(text) for text in RECIPE.places["TRL"]]
    here = [place for place in places if place.path == "trl/trainer/sft_config.py"]
    said = {match[0] for place in here if (match := re.match(r"\w+(?=: )", place.words))}
    assert said >= {"packing", "activation_offloading", "router_aux_loss_coef"} and said <= names
    absent = {place.words for place in here if place.line is None}
    assert "mixup" in absent and not any(words in name for words in absent for name in names)


def unpacked(folder: Path) -> Path:
    """A folder with one small distribution of one module."""
    (folder / "peer").mkdir(parents=True)
    (folder / "peer" / "trainer.py").write_text("class Trainer:\n    packing: bool = False\n")
    (folder / "peer-1.0.dist-info").mkdir()
    (folder / "peer-1.0.dist-info" / "RECORD").write_text("peer/trainer.py,,\npeer-1.0.dist-info/RECORD,,\n")
    (folder / "other").mkdir()
    (folder / "other" / "trainer.py").write_text("packing\n")
    return folder


@pytest.mark.parametrize(
    "versions,place,wrong",
    [
        ("peer 1.0", "peer/trainer.py:2 packing", None),
        ("peer 1.0", "peer: no mixup", None),
        ("peer 1.0", "peer/trainer.py:1 packing", "Peer: peer/trainer.py:1: 'packing' stands in line 2"),
        ("peer 1.0", "peer/trainer.py:9 mixup", "Peer: peer/trainer.py:9: 'mixup' stands nowhere"),
        ("peer 1.0", "peer: no PACKING", "Peer: peer: 'PACKING' stands in peer/trainer.py"),
        ("peer 1.0", "peer/gone.py: no mixup", "Peer: peer/gone.py: not there"),
        ("peer 1.0", "other/trainer.py:1 packing", "Peer: other/trainer.py: not of peer 1.0"),
        ("peer 2.0", "peer/trainer.py:2 packing", "Peer: peer 2.0: in none of the folders"),
    ],
)
def test_a_place_is_looked_up(tmp_path: Path, versions: str, place: str, wrong: str | None) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = faults("Peer", versions, [place], [empty, unpacked(tmp_path / "wheels")])
    assert found == ([] if wrong is None else [wrong])


@pytest.mark.parametrize("text", ["peer/trainer.py packing", "peer: packing", "peer:2", "", "peer: no "])
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="place: expected"):
        read_place(text)


def test_verify_records_when_all_is_found_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    row: dict[str, Any] = {"name": "packing", "ours": ["no", ""], "tests": [], "arguments": []}
    content = {"versions": {"Peer": "peer 1.0"}, "verified": {"date": "", "digest": ""}, "features": [row]}
    data, page = tmp_path / "list.json", tmp_path / "LIST.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    listing, folder = Listing(data, page), unpacked(tmp_path / "wheels")
    monkeypatch.setattr(listed, "TRAINERS", listing)
    monkeypatch.setattr(listed, "LISTS", (listing,))

    row["peers"] = {"Peer": ["yes", "", "peer/trainer.py:7 packing"]}
    data.write_text(json.dumps(content))
    before = data.read_bytes()
    assert listed.main(["--verify", str(folder)]) == 1 and data.read_bytes() == before
    assert "'packing' stands in line 2" in capsys.readouterr().err

    row["peers"] = {"Peer": ["yes", "", "peer/trainer.py:2 packing"]}
    data.write_text(json.dumps(content))
    assert listed.main(["--verify", str(folder)]) == 0
    features = read_features(data)
    assert features.verified and features.verified["digest"] == digest(features.places, features.versions)
    assert features.verified["date"] in page.read_text()


def test_a_trainer_without_a_place_is_refused(tmp_path: Path) -> None:
    content = json.loads(TRAINERS.data.read_text(encoding="utf-8"))
    content["features"][0]["peers"]["TRL"] = ["no", "a note"]
    path = tmp_path / "trainers.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a place for each peer"):
        read_features(path)
