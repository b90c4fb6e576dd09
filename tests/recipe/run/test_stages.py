"""The stages as a user runs them: files in, files out, stopped and started again, alone or all in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftmix.cli import default_run_dir, knob_flags
from sftmix.run import stages
from sftmix.scores.dynamics import read_dynamics
from sftmix.training.metrics import read_metrics
from tests.recipe import tiny
from tests.recipe.run.small import FLAGS, run, same, sftmix, stop_in, trained

ROOT = Path(__file__).resolve().parents[3]


def test_run_leaves_every_file_of_the_run_folder(finished: Path) -> None:
    for name in (
        "config.yaml", "stages.json", "dynamics.parquet", "split.parquet", "evaluation.json", "reference/metrics.jsonl",
        "train-ntp/metrics.jsonl", "train-sftmix/metrics.jsonl", "plots/data_map.png", "plots/loss_curves.png",
        "plots/confidence.png",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    both = [read_dynamics(finished / "dynamics.parquet", source) for source in ("checkpoint", "online")]
    assert [d.num_checkpoints for d in both] == [2, 2] and both[0].examples == both[1].examples


def test_trained_model_loads_with_plain_transformers_and_moved(
    finished: Path, material: tuple[Path, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "train-sftmix" / "model")
    base = AutoModelForCausalLM.from_pretrained(material[0])
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert not same(trained(finished, "ntp"), trained(finished, "sftmix"))


def test_the_trained_model_and_the_samples_know_where_training_ended_answers(finished: Path) -> None:
    saved = json.loads((finished / "train-sftmix" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 2  # <|im_end|>
    samples = json.loads((finished / "evaluation.json").read_text())["sftmix"]["samples"]
    assert all(
        isinstance(sample["stopped"], bool) and "<|im_end|>" not in sample["answer"] for sample in samples
    )


def test_ntp_and_sftmix_saw_the_same_batches(finished: Path) -> None:
    ntp, mixed = (read_metrics(finished / f"train-{m}" / "metrics.jsonl") for m in ("ntp", "sftmix"))
    assert [r["num_tokens"] for r in ntp] == [r["num_tokens"] for r in mixed]
    assert ntp[0]["ntp_loss"] == mixed[0]["ntp_loss"]  # the first step: same weights, same batch
    assert all(r["mixup_loss"] is None for r in ntp) and all(r["mixup_loss"] > 0 for r in mixed)


def test_evaluation_has_base_ntp_and_sftmix(finished: Path) -> None:
    results = json.loads((finished / "evaluation.json").read_text())
    assert list(results) == ["base", "ntp", "sftmix"]
    assert results["sftmix"]["nll"] < results["base"]["nll"]
    assert all(len(r["samples"]) == 3 for r in results.values())


def test_stages_one_by_one_give_the_same_bits_as_run(
    finished: Path, material: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "by_stage"
    sftmix("reference", folder, f"model.name={material[0]}", f"data.train={material[1]}", *FLAGS)
    for stage in ("score", "split"):
        sftmix(stage, folder)
    sftmix("train", folder, "--train.method", "ntp")
    sftmix("train", folder, "--train.method", "sftmix")
    sftmix("evaluate", folder)
    sftmix("plot", folder)
    for name in ("dynamics.parquet", "split.parquet"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    assert same(trained(folder), trained(finished)) and same(trained(folder, "ntp"), trained(finished, "ntp"))
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(
        (finished / "evaluation.json").read_text()
    )


@pytest.mark.parametrize("stage,call", [("reference", 3), ("train ntp", 5), ("train sftmix", 6)])
def test_a_run_stopped_in_any_training_goes_on_to_the_same_bits(
    finished: Path,
    material: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    call: int,
) -> None:
    folder = tmp_path / "stopped"

    stop_in(monkeypatch, stage, lambda: run(material, folder), step=call)
    done = {"reference": ["base"], "train ntp": ["base"], "train sftmix": ["base", "ntp"]}
    assert list(json.loads((folder / "evaluation.json").read_text())) == done[stage]
    run(material, folder)
    assert same(trained(folder), trained(finished)) and same(trained(folder, "ntp"), trained(finished, "ntp"))


def test_a_second_run_does_nothing_again(
    finished: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    for name in ("train_plain", "train_pairs", "score_points"):
        monkeypatch.setattr(stages, name, refuse)
    run(material, finished)


def test_ready_scores_replace_the_reference(
    finished: Path, material: tuple[Path, Path], tmp_path: Path
) -> None:
    run(material, tmp_path / "r", "--no-baseline", f"--reference.scores={finished / 'dynamics.parquet'}")
    assert same(trained(tmp_path / "r"), trained(finished))
    assert not (tmp_path / "r" / "reference").exists() and not (tmp_path / "r" / "train-ntp").exists()


def test_lora_merges_into_a_plain_model(material: tuple[Path, Path], tmp_path: Path) -> None:
    run(
        material,
        tmp_path / "r",
        "--no-baseline",
        "--train.tuning",
        "lora",
        "--train.epochs=1",
        "--reference.epochs=1",
    )
    results = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert results["sftmix"]["nll"] < results["base"]["nll"]
    assert not any("lora" in name for name in trained(tmp_path / "r"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "train-sftmix" / "model") is not None


def test_reference_of_another_model_scores_for_the_target(
    material: tuple[Path, Path], tmp_path: Path
) -> None:
    """A weaker reference's split transfers to the trained model (the paper's Gemma-2B reference)."""
    tiny.causal_lm("gpt2", seed=3).save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    run(
        material,
        tmp_path / "r",
        "--no-baseline",
        "--reference.model",
        str(tmp_path / "gpt2"),
        "--train.epochs=1",
    )
    assert (tmp_path / "r" / "train-sftmix" / "model" / "config.json").exists()


def test_alpaca_file_of_a_user(material: tuple[Path, Path], shared_data: Path, tmp_path: Path) -> None:
    """``sftmix run --data alpaca_en_demo.json.xz --model ID``: real instructions through every stage."""
    data = shared_data / "alpaca_en_demo.json.xz"
    limits = ["--data.limit=40", "--data.max_length=512", "--train.epochs=1", "--reference.epochs=1"]
    run((material[0], data), tmp_path / "r", "--no-baseline", *limits)
    results = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert results["sftmix"]["nll"] < results["base"]["nll"] and results["base"]["num_examples"] == 8


BROKEN: list[tuple[str, bytes | None, Sequence[str], str]] = [
    ("dynamics.parquet", b"PAR1 cut", ["split"], "dynamics.parquet: "),
    ("split.parquet", b"PAR1 cut", ["train"], "split.parquet: "),
    ("split.parquet", None, ["train"], "split.parquet is gone; run `sftmix split`"),
    ("stages.json", b'{"score": ', ["score"], "stages.json: expected JSON"),
    ("config.yaml", b"model: [", ["split"], "config.yaml: expected a YAML file"),
    (
        "train-sftmix/model",
        None,
        ["train", "--optim.lr", "0.5"],
        "train-sftmix was finished, got others: optim.lr: 0.01 → 0.5; .* --restart train-sftmix",
    ),
]


@pytest.mark.parametrize("name,content,command,message", BROKEN, ids=[f"{b[0]}-{b[2][0]}" for b in BROKEN])
def test_broken_run_folders_are_refused_and_nothing_is_lost(
    finished: Path, tmp_path: Path, name: str, content: bytes | None, command: Sequence[str], message: str
) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    path = folder / name
    if content is not None:
        path.write_bytes(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    before = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml"}
    with pytest.raises(ValueError, match=message):
        sftmix(command[0], folder, *command[1:])
    assert before <= {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def test_changed_data_is_noticed(finished: Path, material: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    folder, data = tmp_path / "r", tmp_path / "changed.jsonl"
    shutil.copytree(finished, folder)
    lines = material[1].read_text().splitlines(keepends=True)
    data.write_text("".join(lines[2:]))
    with pytest.raises(
        ValueError, match=r"reference was finished, got others: examples: other tokens; data.train: .*changed"
    ):
        sftmix("split", folder, "--data.train", data)


def test_flags_in_all_their_forms() -> None:
    assert knob_flags(["--a.b", "1", "--c=2", "d.e=3"]) == ["a.b=1", "c=2", "d.e=3"]
    with pytest.raises(ValueError, match="flag: expected --knob value or knob=value, got 'stray'"):
        knob_flags(["stray"])
    with pytest.raises(ValueError, match=r"--a.b: expected a value after it, got nothing"):
        knob_flags(["--a.b"])
    assert default_run_dir("data/alpaca_en.json.xz", "org/SmolLM2-135M") == "runs/alpaca_en-SmolLM2-135M"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sftmix", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip


def test_bad_input_is_one_line_and_exit_code_2(material: tuple[Path, Path], tmp_path: Path) -> None:
    cases = {
        "data.train: ": ["run", "--model", str(material[0]), "--run-dir", str(tmp_path / "a")],
        "train.epoch: unknown knob; did you mean train.epochs?": [
            "split",
            str(tmp_path / "b"),
            "--train.epoch=1",
        ],
    }
    for message, arguments in cases.items():
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"sftmix: {message}"), (
            done.stderr
        )


def test_torchrun_trains_as_one_process_does(finished: Path, tmp_path: Path) -> None:
    """``torchrun --nproc-per-node 2 -m sftmix train`` on a copy of the run folder, from the split on."""
    import shutil

    folder = tmp_path / "two"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("train-*", "stages.json"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sftmix",
         "train", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: ") == 1  # the main process alone speaks
    one, two = trained(finished), trained(folder)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)
