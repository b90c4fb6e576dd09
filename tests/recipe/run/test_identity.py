"""One run folder, one set of settings: what differs is refused and named, what does not matter goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftmix.run import models as models_module
from sftmix.run import stages
from sftmix.run.folder import RunFolder, stages_from
from sftmix.run.identity import differences
from sftmix.run.session import Session
from sftmix.scores.confidence import read_split, write_split
from sftmix.scores.dynamics import read_dynamics
from sftmix.training.metrics import read_metrics
from tests.recipe import tiny
from tests.recipe.run.small import run, same, sftmix, stop_in, trained

Material = tuple[Path, Path]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run folder that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_case_35_another_max_length_in_a_finished_folder_is_refused(
    material: Material, tmp_path: Path
) -> None:  # fmt: skip
    """60 tokens, then 2048: every stage said done before, and the old model stood under the new settings."""
    folder = tmp_path / "r"
    run(material, folder, "--data.max_length=12", "--no-baseline", "--train.epochs=1", "--reference.epochs=1")
    before, old = files(folder), trained(folder)
    new = ["--no-baseline", "--train.epochs=1", "--reference.epochs=1", "--data.max_length=2048"]
    with pytest.raises(ValueError) as refusal:
        run(material, folder, *new)
    message = str(refusal.value)
    assert (
        "reference was finished, got others: examples: other tokens; data.max_length: 12 → 2048;" in message
    )
    assert "take another run folder, or --restart reference, which removes reference, " in message
    assert files(folder) == before  # config.yaml among them
    run(material, folder, *new, "--restart", "reference")
    assert not same(trained(folder), old)
    fresh = tmp_path / "fresh"
    run(material, fresh, *new)
    assert same(trained(folder), trained(fresh))


def test_another_chat_template_is_refused(copy: Path, material: Material, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(tiny.CHATML.replace("message['role'] + ' '", "message['role'] + ' w3 '"))
    with pytest.raises(ValueError, match=r"examples: other tokens; data.chat_template: null → .*other.jinja"):
        run(material, copy, "--data.chat_template", str(template))


def test_a_date_that_the_template_prints_is_noticed_though_no_knob_changed(
    material: Material, tmp_path: Path
) -> None:  # fmt: skip
    template, folder = tmp_path / "dated.jinja", tmp_path / "r"
    few = ["--no-baseline", "--train.epochs=1", "--reference.epochs=1", f"--data.chat_template={template}"]
    template.write_text("w1 " + tiny.CHATML)
    run(material, folder, *few)
    template.write_text("w2 " + tiny.CHATML)
    with pytest.raises(ValueError, match=r"got others: examples: other tokens; take another run folder"):
        run(material, folder, *few)


DIFFERENT = {
    "--optim.lr=0.5": ("reference", "optim.lr: 0.01 → 0.5"),
    "--seed=1": ("reference", "seed: 0 → 1"),
    "--reference.epochs=3": (
        "score",
        "reference.epochs: 2 → 3; take another run folder, or --restart score,",
    ),
    "--reference.epochs=1": ("reference", "reference.epochs: 2 → 1"),
    "--train.max_steps=2": ("reference", "train.max_steps: null → 2"),
    "--train.epochs=1": ("train-ntp", "train.epochs: 2 → 1; take another run folder, or --restart train,"),
    "--mixup.weight=0.4": ("train-sftmix", "mixup.weight: 0.2 → 0.4"),
    "--data.limit=20": ("reference", "examples: other tokens; data.limit: null → 20"),
    "--data.heldout_fraction=0.3": ("reference", "data.heldout_fraction: 0.2 → 0.3"),
}


@pytest.mark.parametrize("flag", DIFFERENT)
def test_each_setting_is_refused_by_the_first_stage_that_depends_on_it(
    copy: Path, material: Material, flag: str
) -> None:  # fmt: skip
    stage, message = DIFFERENT[flag]
    before = files(copy)
    with pytest.raises(ValueError) as refusal:
        run(material, copy, flag)
    assert f"{stage} was finished, got others: " in str(refusal.value) and message in str(refusal.value)
    assert files(copy) == before


def test_settings_without_effect_on_results_and_a_moved_file_go_on(
    copy: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    for name in ("train_plain", "train_pairs", "score_points"):
        monkeypatch.setattr(stages, name, refuse)
    moved = tmp_path / "elsewhere"
    shutil.copytree(material[0], moved / "model")
    shutil.copy(material[1], moved / "renamed.jsonl")
    flags = ["--train.log_every=5", "--train.micro_batch_size=8", "--data.num_workers=1", "--train.impl=reference",
             "--evaluate.batch_size=4", "--data.max_length=1000", "--train.gradient_checkpointing=true"]  # fmt: skip
    run((moved / "model", moved / "renamed.jsonl"), copy, *flags)


def test_more_epochs_are_added_to_a_finished_run(copy: Path, material: Material, capfd: Any) -> None:
    """Training goes on from its last step, is exported and evaluated anew, and the record says how it came about."""
    before = trained(copy)
    run(material, copy, "--train.epochs=3")
    told = capfd.readouterr().out
    for method in ("ntp", "sftmix"):
        assert f"train-{method}: goes on from where it was finished, with train.epochs: 2 → 3" in told
        assert f"train-{method}: 6 steps were finished; the next 3 follow the schedule of 9 steps" in told
        steps = [record["step"] for record in read_metrics(copy / f"train-{method}" / "metrics.jsonl")]
        assert steps == list(range(1, 10))
    assert (
        "reference: done before" in told
        and "anew, the figures that stand there are about other model" in told
    )
    assert not same(trained(copy), before)
    record = RunFolder(copy).record()["train-sftmix"]
    assert record["lengthened"] == ["train.epochs: 2 → 3"] and record["state"] == "finished"
    run(material, copy, "--train.epochs=3")
    assert "train sftmix: done before" in capfd.readouterr().out


def test_more_epochs_of_the_reference_add_scoring_points(copy: Path, material: Material) -> None:
    run(material, copy, "--reference.epochs=3", "--restart=score")
    dynamics = read_dynamics(copy / "dynamics.parquet")
    assert dynamics.num_checkpoints == 3 and sorted(set(dynamics.step[:, 0].tolist())) == [3, 6, 9]
    steps = [record["step"] for record in read_metrics(copy / "reference" / "metrics.jsonl")]
    assert steps == list(range(1, 10))


def test_a_stage_that_left_nothing_binds_nobody(
    copy: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun and refused late, or killed before its first checkpoint: other settings may follow, also the first ones."""
    shutil.rmtree(copy / "train-ntp")
    shutil.rmtree(copy / "train-sftmix")

    def refuse(*args: object, **options: object) -> None:
        raise ValueError("too late")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_pairs", refuse)
        with pytest.raises(ValueError, match="too late"):
            run(material, copy, "--mixup.weight=0.4", "--restart=train")
    assert RunFolder(copy).record()["train-ntp"]["state"] == "begun"
    run(material, copy, "--mixup.weight=0.2")


def test_the_smoke_test_of_one_step(material: Material, tmp_path: Path) -> None:
    """--train.max_steps 1 runs through all stages; online scores, which would lack examples, are refused before all."""
    run(material, tmp_path / "r", "--train.max_steps=1", "--reference.dynamics=checkpoint")
    assert read_dynamics(tmp_path / "r" / "dynamics.parquet").step.tolist() == [[1] * 24]
    for dynamics in ("online", "both"):
        with pytest.raises(
            ValueError, match=r"reference\.dynamics: expected checkpoint where train.max_steps=1 ends"
        ):
            run(material, tmp_path / "q", "--train.max_steps=1", f"--reference.dynamics={dynamics}")
        assert not (tmp_path / "q" / "config.yaml").exists()


def test_another_model_of_the_same_shape_is_refused(copy: Path, material: Material, tmp_path: Path) -> None:
    tiny.causal_lm(seed=5).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"got others: model: other files; model.name: .*model → .*other;"):
        run((tmp_path / "other", material[1]), copy)


def test_unfinished_work_is_refused_too(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = tmp_path / "r"
    stop_in(monkeypatch, "reference", lambda: run(material, folder, "--data.max_length=12"))
    assert (folder / "reference" / "checkpoints").is_dir()
    with pytest.raises(
        ValueError, match=r"reference was begun, got others: examples: other tokens; data.max_length: 12"
    ):
        run(material, folder, "--data.max_length=2048")
    (folder / "stages.json").unlink()  # the checkpoint itself knows
    with pytest.raises(ValueError, match=r"checkpoint: .* belongs to another run: examples is "):
        run(material, folder, "--data.max_length=2048")


def test_a_checkpoint_of_another_base_model_is_refused_without_a_record(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = tmp_path / "r"
    stop_in(monkeypatch, "reference", lambda: run(material, folder))
    (folder / "stages.json").unlink()
    tiny.causal_lm(seed=5).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"checkpoint: .* belongs to another run: model files is "):
        run((tmp_path / "other", material[1]), folder)


def test_a_single_stage_on_other_tokens_than_the_ones_before_is_refused(copy: Path) -> None:
    for stage in ("score", "split", "train", "evaluate"):
        before = files(copy)
        with pytest.raises(
            ValueError, match=r"reference was finished, got others: examples: other tokens; data.max_"
        ):
            sftmix(stage, copy, "--data.max_length=12")
        assert files(copy) == before
    with pytest.raises(ValueError, match=r"reference was finished, got others: examples: other tokens"):
        sftmix("train", copy, "--data.max_length=12", "--restart", "train")


def test_restart_removes_the_stage_and_what_follows_and_says_so(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = json.loads((copy / "evaluation.json").read_text())["base"]
    scores = (copy / "dynamics.parquet").read_bytes()
    sftmix("train", copy, "--mixup.weight=0.4", "--restart", "train-sftmix")
    assert (
        "restart train-sftmix: removed train-sftmix/, evaluation.json, evaluation/, plots/"
        in capsys.readouterr().out
    )
    assert (copy / "train-ntp" / "model").is_dir() and (copy / "dynamics.parquet").read_bytes() == scores
    assert not (copy / "evaluation.json").exists()
    sftmix("evaluate", copy)
    assert json.loads((copy / "evaluation.json").read_text())["base"] == base
    with pytest.raises(ValueError, match=r"restart: expected one of reference, score, .* got 'trian'"):
        sftmix("train", copy, "--restart", "trian")


def test_restart_keeps_everything_when_the_data_cannot_be_used(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    before = files(copy)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        sftmix("reference", copy, "--data.train", tmp_path / "bad.jsonl", "--restart", "all")
    assert files(copy) == before


def test_stages_that_a_restart_does_anew() -> None:
    assert stages_from(None) == ()
    assert stages_from("all") == stages_from("reference")
    assert stages_from("split") == ("split", "train-ntp", "train-sftmix", "evaluate", "plot")
    assert stages_from("train") == ("train-ntp", "train-sftmix", "evaluate", "plot")
    assert stages_from("train-ntp") == ("train-ntp", "evaluate", "plot")
    assert stages_from("evaluate") == ("evaluate", "plot")


def test_evaluation_is_about_the_held_out_set_and_models_it_names(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sftmix("evaluate", copy)
    assert capsys.readouterr().out.count(": done before") == 3
    first = json.loads((copy / "evaluation.json").read_text())
    sftmix("evaluate", copy, "--evaluate.limit=2")
    assert (
        "evaluate base: anew, the figures that stand there are about other held-out examples"
        in capsys.readouterr().out
    )
    second = json.loads((copy / "evaluation.json").read_text())
    assert {f["num_examples"] for f in second.values()} == {2} and second["base"]["nll"] != first["base"][
        "nll"
    ]
    model = copy / "train-sftmix" / "model" / "model.safetensors"
    shutil.copy(copy / "train-ntp" / "model" / "model.safetensors", model)
    with pytest.raises(
        ValueError, match=r"model.safetensors is damaged: .*; run `sftmix train --train.method sftmix`"
    ):
        sftmix("evaluate", copy)
    assert json.loads((copy / "evaluation.json").read_text()) == second


def test_scores_of_other_examples_are_refused_without_a_record(
    copy: Path, material: Material, tmp_path: Path
) -> None:
    (copy / "stages.json").unlink()
    data = tmp_path / "changed.jsonl"
    data.write_text("".join(material[1].read_text().splitlines(keepends=True)[2:]))
    before = files(copy)
    with pytest.raises(
        ValueError, match=r"dynamics.parquet: expected exactly the examples of data.train, got 0"
    ):
        sftmix("split", copy, "--data.train", data)
    with pytest.raises(
        ValueError, match=r"split.parquet: expected exactly the examples of data.train, got 0"
    ):
        sftmix("train", copy, "--data.train", data)
    assert files(copy) == before


def test_a_refused_score_leaves_the_configuration_as_it_was(copy: Path) -> None:
    RunFolder(copy).remove(("score", "split"))
    before = files(copy)
    with pytest.raises(ValueError, match=r"reference was finished, got others: optim.lr: 0.01 → 0.5; take"):
        sftmix("score", copy, "--optim.lr=0.5")
    assert files(copy) == before


def test_pictures_change_no_setting(copy: Path) -> None:
    before = (copy / "config.yaml").read_bytes()
    (copy / "plots" / "loss_curves.png").write_bytes(b"old")
    for method in ("ntp", "sftmix"):
        shutil.rmtree(copy / f"train-{method}")
    shutil.rmtree(copy / "reference")
    sftmix("plot", copy, "--data.max_length=12")
    assert (copy / "config.yaml").read_bytes() == before
    assert not (copy / "plots" / "loss_curves.png").exists() and (copy / "plots" / "data_map.png").exists()


def test_another_split_than_the_scores_give_is_not_overwritten(copy: Path) -> None:
    halves = read_split(copy / "split.parquet")
    confident = [*halves.confident[1:], halves.unconfident[0]]
    other = dataclasses.replace(
        halves, confident=confident, unconfident=[halves.confident[0], *halves.unconfident[1:]]
    )
    write_split(copy / "split.parquet", other)
    with pytest.raises(
        ValueError, match=r"split.parquet: expected the split that split.by=median gives, got another"
    ):
        sftmix("split", copy)


def test_a_reference_whose_files_are_gone_is_made_again(copy: Path) -> None:
    """The record said finished, so the stage was passed over and the next one asked for it, in a circle."""
    shutil.rmtree(copy / "reference")
    sftmix("reference", copy)
    assert (copy / "reference" / "point-001").is_dir()


def test_a_record_of_an_older_version_is_refused(copy: Path) -> None:
    (copy / "stages.json").write_text(json.dumps({"reference": {"seed": 0}}))
    with pytest.raises(
        ValueError, match=r"got one of an older version; take another run folder, or --restart ref"
    ):
        sftmix("reference", copy)


def test_differences_are_told_by_dotted_name() -> None:
    told = differences({"a.b": 60, "same": 1, "old": True}, {"a.b": 2048, "same": 1, "split": "x"})
    assert told == ["a.b: 60 → 2048", "split: other halves", "old: true → null"]


def test_restart_all_ends_in_the_bits_of_a_new_folder(finished: Path, copy: Path, material: Material) -> None:
    run(material, copy, "--restart", "all")
    assert same(trained(copy), trained(finished)) and same(trained(copy, "ntp"), trained(finished, "ntp"))


def test_held_out_examples_that_are_trained_on_are_refused(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--no-baseline", "--train.epochs=1", "--reference.epochs=1"]
    lines = material[1].read_text().splitlines(keepends=True)
    heldout, folder = tmp_path / "heldout.jsonl", tmp_path / "r"
    with pytest.raises(ValueError, match=r"data.heldout: expected another source than data.train, got "):
        run(material, folder, *few, "--data.heldout", str(material[1]))
    heldout.write_text("".join(lines[:2]) + '{"prompt": "w1 w2", "completion": "w3 w4"}\n')
    with pytest.raises(
        ValueError, match=r"data.heldout: expected examples that are not in data.train, got 2 of 3"
    ):
        run(material, folder, *few, "--data.heldout", str(heldout))
    assert not folder.exists()
    run(material, folder, *few, "--data.heldout", str(heldout), "--data.allow_overlap=true")
    assert "held-out: 2 of 3 examples are training examples too" in capsys.readouterr().out
    first = json.loads((folder / "evaluation.json").read_text())
    heldout.write_text('{"prompt": "w1 w2", "completion": "w3 w4"}\n')
    run(material, folder, *few, "--data.heldout", str(heldout))  # trained as before, evaluated anew
    out = capsys.readouterr().out
    assert "train sftmix: done before" in out and "evaluate sftmix: anew, the figures that stand" in out
    second = json.loads((folder / "evaluation.json").read_text())
    assert (first["base"]["num_examples"], second["base"]["num_examples"]) == (3, 1)


def test_figures_do_not_outlive_their_held_out_set(material: Material, tmp_path: Path) -> None:
    few = ["--no-baseline", "--train.epochs=1", "--reference.epochs=1", "--data.heldout_fraction=0"]
    heldout, folder = tmp_path / "heldout.jsonl", tmp_path / "r"
    heldout.write_text('{"prompt": "w1 w2", "completion": "w3 w4"}\n')
    run(material, folder, *few, "--data.heldout", str(heldout))
    assert (folder / "evaluation.json").exists()
    run(material, folder, *few, "--data.heldout", "null")
    assert not (folder / "evaluation.json").exists()


def test_another_tokenizer_in_the_same_place_is_refused(
    copy: Path, material: Material, tmp_path: Path
) -> None:
    """The model's files stand as they were; the words have other numbers."""
    model = tmp_path / "model"
    shutil.copytree(material[0], model)
    text = (model / "tokenizer.json").read_text()
    swapped = text.replace('"w1":', '"@":').replace('"w2":', '"w1":').replace('"@":', '"w2":')
    assert swapped != text
    (model / "tokenizer.json").write_text(swapped)
    with pytest.raises(
        ValueError, match=r"got others: examples: other tokens; model.name: .* → .*model; take another"
    ):
        run((model, material[1]), copy)


def test_adapters_of_another_rank_are_refused_and_unused_ranks_are_not(
    copy: Path, material: Material, tmp_path: Path
) -> None:
    run(material, copy, "--lora.rank=4")  # train.tuning is full: nothing reads it
    lora = ["--no-baseline", "--train.tuning=lora", "--train.epochs=1", "--reference.epochs=1"]
    run(material, tmp_path / "r", *lora)
    with pytest.raises(ValueError, match=r"reference was finished, got others: lora.rank: 16 → 4; take"):
        run(material, tmp_path / "r", *lora, "--lora.rank=4")


def test_unfinished_work_with_another_batch_size_is_refused(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    stop_in(monkeypatch, "train ntp", lambda: run(material, folder))
    with pytest.raises(ValueError, match=r"got others: train.batch_size: 8 → 4; .* --restart reference"):
        run(material, folder, "--train.batch_size=4")
    run(material, folder)
    assert (folder / "train-sftmix" / "model").is_dir()


def test_a_converted_gguf_file_of_another_model_does_not_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """base/ was taken whatever model it had been made of."""
    converted: list[str] = []

    def convert(model: Any, tokenizer: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        converted.append(model)

    monkeypatch.setattr(models_module, "load_model", lambda source: (source.gguf_file, None))
    monkeypatch.setattr(models_module, "merge_and_export", convert)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(name.encode() * 10_000)

    def source(file: str, **options: Any) -> Any:
        flags = [f"run_dir={tmp_path / 'r'}", f"model.name={tmp_path}", f"model.gguf_file={file}"]
        return Session(tiny.config(*flags), **options).models.source

    assert source("one.gguf").name == str(tmp_path / "r" / "base")
    source("one.gguf")
    assert converted == ["one.gguf"]
    source("two.gguf")  # no stage has begun: it is made again
    assert converted == ["one.gguf", "two.gguf"]
    RunFolder(tmp_path / "r").note("reference", "begun", {}, {})
    with pytest.raises(
        ValueError, match=r"base: expected the model of .*one.gguf in float32, got another; take"
    ):
        source("one.gguf")
    source("one.gguf", restart="all")
    (tmp_path / "r" / "base" / "source.json").unlink()  # a conversion that was killed
    source("one.gguf")
    assert converted == ["one.gguf", "two.gguf", "one.gguf", "one.gguf"]
