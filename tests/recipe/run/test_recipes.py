"""The recipes are accepted as they stand, say what the paper says, and a dry run writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from sftmix.config import load_config
from sftmix.recipes import FOLDER, config_file, recipes
from tests.recipe import tiny
from tests.recipe.run.small import run, sftmix

PAPER = [name for name in recipes() if name.startswith("paper-")]
ROW = '{"instruction": "w1 w2", "input": "", "output": "w3 w4"}\n'


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_dry_run_takes_it_and_writes_nothing(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    sftmix("run", "--config", name, "--data", "rows.jsonl", "--run-dir", "r", "--dry-run")
    out = capfd.readouterr()
    told = yaml.safe_load(out.out[out.out.index("run_dir: r") :].partition("\nreference: to do")[0])
    wanted = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    for section, values in wanted.items():
        for knob, value in values.items() if isinstance(values, dict) else ():
            if (section, knob) not in (("data", "train"), ("data", "chat_template")):
                assert told[section][knob] == value, (section, knob)
    assert "train-sftmix: to do" in "".join(out) and "nothing was written" in "".join(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name: str) -> None:
    """arXiv 2410.05248: AdamW, lr 2e-6, weight decay 0.1, cosine, warm-up 0.1, batch 32, mu 0.2, Beta(0.5, 0.5)."""
    config = load_config(config_file(name), ["run_dir=r"])
    optim, mixup = config.optim, config.mixup
    assert (optim.lr, optim.weight_decay, optim.schedule, optim.warmup_ratio) == (2e-6, 0.1, "cosine", 0.1)
    assert (config.train.batch_size, config.train.tuning) == (32, "full")
    assert (mixup.weight, mixup.alpha, mixup.lam) == (0.2, 0.5, "pair")
    assert config.train.epochs == (1 if "ultrachat" in name else 3)
    words = name.split("-")
    assert {"llama": "Llama-3.1-8B", "mistral": "Mistral-7B", "qwen": "Qwen2.5-14B"}[
        words[1]
    ] in config.model.name


def test_all_of_the_papers_models_and_data_are_there() -> None:
    for part in ("llama-3.1-8b", "mistral-7b", "qwen-2.5-14b", "alpaca", "ultrachat", "medalpaca"):
        assert any(part in name for name in PAPER), part
    assert {"qlora-24gb", "eight-h100", "cpu"} <= recipes().keys()


def test_the_list_names_every_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    sftmix("recipes")
    out = "".join(capfd.readouterr())
    assert all(name[:20] in out for name in recipes()) and all(recipes().values())


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config: expected a YAML file or a recipe \(cpu, .*\), got 'gpu'"):
        sftmix("run", "--config", "gpu", "--data", "x", "--dry-run")
    with pytest.raises(ValueError, match=r"gone\.yaml: expected a YAML file"):
        sftmix("run", "--config", str(tmp_path / "gone.yaml"), "--data", "x", "--dry-run")


def test_a_dry_run_says_what_is_done(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "r"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capfd.readouterr()
    run(material, folder, "--dry-run")
    out = "".join(capfd.readouterr())
    assert "reference: finished before" in out and "train-sftmix: finished before" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"optim\.lr"):
        run(material, folder, "--optim.lr", "-1", "--dry-run")


def test_the_chat_template_serves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every text of a conversation is found in it, and answers end with a token that stops."""
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.causal_lm().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(ROW)
    sftmix(
        "data", tmp_path / "rows.jsonl", "--model", tmp_path / "model",
        "--data.chat_template", FOLDER / "chatml.jinja", "--data.heldout_fraction", "0",
    )  # fmt: skip
    out = "".join(capfd.readouterr())
    assert "1 of 1 used" in out
