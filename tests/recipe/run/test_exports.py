"""What a run leaves to be used: models and adapters that are what was trained, with all the files they need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.model import export as export_module
from sftmix.run.folder import RunFolder
from tests.recipe import tiny
from tests.recipe.model import architectures
from tests.recipe.run.small import run, same, trained

SHORT = [
    "--train.epochs=1",
    "--reference.epochs=1",
    "--reference.dynamics=online",
    "--evaluate.num_samples=1",
]
LORA = [*SHORT, "--train.tuning=lora", "--lora.rank=2", "--no-baseline"]
IDS = torch.tensor([[5, 8, 9, 30, 2]])


def evaluation(folder: Path) -> Any:
    return json.loads((folder / "evaluation.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_a_failed_export_keeps_the_checkpoint_and_is_repeated_alone(
    finished: Path, material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = export_module.merged_state

    def wrong(model: Any) -> dict[str, torch.Tensor]:
        return {name: value * 1.01 for name, value in merged(model).items()}

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "merged_state", wrong)
        with pytest.raises(ValueError, match="export: expected the files to give the trained model's logits"):
            run(material, tmp_path / "r")
    folder = RunFolder(tmp_path / "r")
    assert folder.record()["train-ntp"]["state"] == "begun" and not folder.model("ntp").exists()
    steps = (folder.train("ntp") / "metrics.jsonl").read_bytes()
    assert list((folder.train("ntp") / "checkpoints").iterdir())
    run(material, tmp_path / "r")
    assert (folder.train("ntp") / "metrics.jsonl").read_bytes() == steps  # nothing was trained again
    assert same(trained(tmp_path / "r"), trained(finished)) and same(
        trained(tmp_path / "r", "ntp"), trained(finished, "ntp")
    )


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_share_that_trains_is_said_once_before_the_first_step(
    tuning: str, material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(material, tmp_path / "r", *(LORA if tuning == "lora" else SHORT))
    lines = capsys.readouterr().out.splitlines()
    (told,) = [
        i for i, line in enumerate(lines) if line.startswith(f"{tuning}: ") and " parameters train" in line
    ]
    assert told < next(i for i, line in enumerate(lines) if "step 1 of" in line)
    total = sum(p.numel() for p in tiny.causal_lm().parameters())
    assert f"full: {total:,} of {total:,} parameters train" in lines or tuning == "lora"


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "qwen3_next", "mixtral"])
def test_adapters_on_experts_are_in_the_exported_model(
    name: str, material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault of the past: down_proj as target, exit code 0, and an exported model that is the base model."""
    base = architectures.build(name, tmp_path / "base")
    run((base, material[1]), tmp_path / "r", *LORA, "--lora.target_modules=down_proj")
    said = capsys.readouterr().out
    assert "lora: " in said and "parameters train" in said and "adapters on" in said
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (base, tmp_path / "r" / "train-sftmix" / "model")
    )
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.state_dict()[n])}
    assert changed and all("down_proj" in n for n in changed)
    assert any(n.endswith("experts.down_proj") for n in changed)
    told = evaluation(tmp_path / "r")
    assert abs(told["sftmix"]["nll"] - told["base"]["nll"]) > 1e-3


@pytest.mark.parametrize("export", ["adapter", "both"])
@pytest.mark.parametrize(
    "options", [[], ["--lora.dora=true"], ["--lora.rslora=true"], ["--lora.modules_to_save=norm"]]
)
def test_an_adapter_is_exported_and_evaluated(
    export: str, options: list[str], material: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its figures are those of the merged export, and peft on the plain base gives them."""
    run(material, tmp_path / "m", *LORA, *options)
    run(material, tmp_path / "r", *LORA, *options, f"--export={export}")
    folder = RunFolder(tmp_path / "r")
    assert folder.model("sftmix").exists() is (export == "both")
    merged, ours = evaluation(tmp_path / "m"), evaluation(tmp_path / "r")
    assert ours["sftmix"]["nll"] == pytest.approx(merged["sftmix"]["nll"], rel=1e-5)
    assert ours["sftmix"]["nll"] < ours["base"]["nll"] - 0.01
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(material[0]), folder.adapter("sftmix")
    )
    other = AutoModelForCausalLM.from_pretrained(RunFolder(tmp_path / "m").model("sftmix"))
    torch.testing.assert_close(logits(plain), logits(other), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder.adapter("sftmix")).chat_template == tiny.CHATML
    assert not list(folder.train("sftmix").glob(".*"))


def test_another_export_of_a_finished_run_trains_nothing_again(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(material, tmp_path / "r", *LORA)
    folder = RunFolder(tmp_path / "r")
    before = (folder.train("sftmix") / "metrics.jsonl").read_bytes()
    weights = trained(tmp_path / "r")
    run(material, tmp_path / "r", *LORA, "--export=both")
    assert (folder.train("sftmix") / "metrics.jsonl").read_bytes() == before
    assert same(trained(tmp_path / "r"), weights)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(material[0]), folder.adapter("sftmix")
    )
    merged = AutoModelForCausalLM.from_pretrained(folder.model("sftmix"))
    torch.testing.assert_close(logits(plain), logits(merged), rtol=1e-4, atol=1e-4)


def test_an_exported_adapter_is_a_base_model_too(
    material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on an adapter's folder begins with the adapter merged into its base, and says so."""
    run(material, tmp_path / "one", *LORA, "--export=both")
    folder = RunFolder(tmp_path / "one")
    capsys.readouterr()
    run((folder.adapter("sftmix"), material[1]), tmp_path / "two", *LORA)
    assert f"is an adapter, merged into its base {material[0]}" in capsys.readouterr().out
    run((folder.model("sftmix"), material[1]), tmp_path / "three", *LORA)
    two, three = evaluation(tmp_path / "two"), evaluation(tmp_path / "three")
    for label in ("base", "sftmix"):
        assert two[label]["nll"] == pytest.approx(three[label]["nll"], rel=1e-5)


def test_the_card_tells_what_the_model_is(material: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.causal_lm().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n")
    (base / "LICENSE").write_text("terms")
    (base / "preprocessor_config.json").write_text('{"size": 3}')
    (base / "tokenizer.model").write_bytes(b"\x00\x01")
    (base / "config.py").write_text("raise SystemExit")  # no code goes along where none is trusted
    run((base, material[1]), tmp_path / "r", *SHORT)
    told = evaluation(tmp_path / "r")
    for method in ("ntp", "sftmix"):
        model = RunFolder(tmp_path / "r").model(method)
        text = (model / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["license"] == "apache-2.0" and front["base_model"] == "base"
        assert front["library_name"] == "transformers" and front["tags"] == [
            "sftmix" if method == "sftmix" else "sft"
        ]
        for label in ("base", method):
            nll, error = told[label]["nll"], told[label]["nll_stderr"]
            assert f"| {label} | {nll:.4f} ± {error:.4f} |" in text
        record = json.loads((tmp_path / "r" / "stages.json").read_text())[f"train-{method}"]["settings"]
        assert f"tokens and masks {record['examples']}" in text and f"files {record['model']}" in text
        assert f"method: {method}" in text and "lr: 0.01" in text
        assert (model / "LICENSE").read_text() == "terms"
        assert (model / "preprocessor_config.json").read_text() == '{"size": 3}'
        assert (model / "tokenizer.model").read_bytes() == b"\x00\x01"
        assert not list(model.glob("*.py"))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # untied, tied
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_added_tokens_are_trained_and_exported_with_the_head(
    kind: str, tuning: str, material: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny.causal_lm(kind).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    template = tmp_path / "t.jinja"
    template.write_text(tiny.CHATML.replace("<|im_end|>", "<|stop|>"))
    flags = [f"--data.chat_template={template}", "--model.added_tokens=<|stop|>"]
    if tuning == "lora":
        with pytest.raises(
            ValueError, match=r"lora.modules_to_save: expected embed_tokens.* with model.added_tokens"
        ):
            run((base, material[1]), tmp_path / "refused", *flags, *LORA)
        whole = "embed_tokens" if kind == "qwen3" else "embed_tokens,lm_head"
        flags += [*LORA, f"--lora.modules_to_save={whole}"]
    else:
        flags += [*SHORT, "--no-baseline"]
    run((base, material[1]), tmp_path / "r", *flags)
    folder = RunFolder(tmp_path / "r").model("sftmix")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == tiny.VOCAB + 1 == plain.config.vocab_size
    assert (
        plain.get_input_embeddings().weight.shape[0]
        == plain.get_output_embeddings().weight.shape[0]
        == tiny.VOCAB + 1
    )
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop == tiny.VOCAB and tokenizer("w1 <|stop|>").input_ids[-1] == stop
    named = plain.generation_config.eos_token_id
    assert stop == named or stop == named[0]
    tied = plain.get_input_embeddings().weight.data_ptr() == plain.get_output_embeddings().weight.data_ptr()
    assert tied is (kind == "qwen3")
    told = evaluation(tmp_path / "r")
    assert abs(told["sftmix"]["nll"] - told["base"]["nll"]) > 1e-3


def test_tokens_without_a_row_are_refused_before_training(
    material: tuple[Path, Path], tmp_path: Path
) -> None:
    """A tokenizer that grew while its model did not."""
    base = tmp_path / "base"
    tiny.causal_lm().save_pretrained(base)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|stop|>"], special_tokens=True)
    tokenizer.chat_template = tiny.CHATML.replace("<|im_end|>", "<|stop|>")
    tokenizer.pad_token = "<|stop|>"
    tokenizer.save_pretrained(base)
    with pytest.raises(
        ValueError, match=r"embedding of 61 rows holds, got <\|stop\|>: --model.added_tokens '<\|stop\|>'"
    ):
        run((base, material[1]), tmp_path / "r", *SHORT)
    run((base, material[1]), tmp_path / "r2", *SHORT, "--no-baseline", "--model.added_tokens", "<|stop|>")
    assert RunFolder(tmp_path / "r2").model("sftmix").exists()


def test_an_adapter_is_refused_where_there_is_none_to_write(
    material: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"export: expected merged with train.tuning=full, which has no adapter"
    ):
        run(material, tmp_path / "r", *SHORT, "--export=adapter")
    with pytest.raises(ValueError, match=r"export: expected merged with model.added_tokens"):
        run(material, tmp_path / "r", *LORA, "--export=both", "--model.added_tokens=<x>")
    assert not (tmp_path / "r").exists()
