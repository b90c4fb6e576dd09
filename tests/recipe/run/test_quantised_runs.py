"""Whole runs on quantised bases: LoRA beside the bits of bitsandbytes, full and LoRA on what is dequantised.

Those with bitsandbytes or torchao are skipped where it is not installed; no test requires it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from sftmix.model.load import load_model
from sftmix.model.lora import apply_lora, trained_share
from sftmix.model.merge import merge_plan
from sftmix.model.quantised import check_quantised, dequantised, exact_products, is_quantised
from tests.recipe import tiny
from tests.recipe.model.test_quantised import bits_model, fp8_model, mxfp4_model, named, saved
from tests.recipe.run.small import run, same, stop_in, trained
from tests.recipe.run.test_stages import command

LORA = ["--train.tuning", "lora", "--no-baseline", "--train.epochs=1", "--reference.epochs=1"]


def check_plain(folder: Path, dtype: torch.dtype) -> Any:
    """The exported model as transformers reads it; neither its files nor its configuration know of a quantisation."""
    files = folder / "train-sftmix" / "model"
    assert "quant" not in (files / "config.json").read_text()
    assert {weight.dtype for weight in load_file(files / "model.safetensors").values()} == {dtype}
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["sftmix"]["nll"] < results["base"]["nll"]
    return AutoModelForCausalLM.from_pretrained(files)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_fp8_and_mxfp4_go_the_whole_road(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], kind: str, tuning: str,
) -> None:  # fmt: skip
    """bfloat16 with an adapter's files too: transformers alone leaves some weights of such a base in float32."""
    base = tmp_path / "base"
    numbers = fp8_model(base) if kind == "fp8" else mxfp4_model(base, monkeypatch)
    name = "float32" if tuning == "full" else "bfloat16"
    flags = ["--no-baseline"] if tuning == "full" else [*LORA, "--export=both"]
    run((base, material[1]), tmp_path / "r", *flags, f"--model.dtype={name}")
    assert f"quantised with {kind}: dequantised to {name}, trained and exported" in capsys.readouterr().out
    plain = check_plain(tmp_path / "r", getattr(torch, name))
    assert plain.state_dict().keys() == numbers.keys()
    assert (tmp_path / "r" / "train-sftmix" / "adapter").is_dir() == (tuning == "lora")


@pytest.mark.parametrize("bits,dtype", [(4, "bfloat16"), (8, "float32")])
def test_bits_go_the_whole_road(
    material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, dtype: str
) -> None:
    """Parameters beside the bits take the run's type; both exports are compared with the trained model there."""
    bits_model(tmp_path / "base", bits)
    run((tmp_path / "base", material[1]), tmp_path / "r", *LORA, "--export=both", f"--model.dtype={dtype}")
    assert capsys.readouterr().out.count(f"bitsandbytes, {bits} bits: kept so and frozen") == 1
    check_plain(tmp_path / "r", getattr(torch, dtype))
    adapter = named(tmp_path / "r" / "train-sftmix" / "adapter", dtype)
    loaded, _ = load_model(adapter, tuning="lora")  # merged into the numbers of its base
    assert "trained and exported without quantisation" in capsys.readouterr().out
    merged = trained(tmp_path / "r")
    assert not any(is_quantised(module) for module in loaded.modules())
    assert all(torch.equal(weight, merged[name]) for name, weight in loaded.base.state_dict().items())


def torchao_model(folder: Path) -> None:
    """A model whose linear layers torchao holds in 8 bits, weights alone."""
    torchao = pytest.importorskip("torchao.quantization")
    saved(folder / "plain", tiny.causal_lm(hidden_size=64, intermediate_size=128), None)
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    saved(folder, AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=settings), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchao_goes_the_whole_road(material: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    torchao_model(tmp_path / "base")
    run((tmp_path / "base", material[1]), tmp_path / "r", *LORA, "--export=both", f"--model.dtype={dtype}")
    check_plain(tmp_path / "r", getattr(torch, dtype))


def test_other_ways_of_torchao_are_refused_by_name(tmp_path: Path) -> None:
    kind = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}, "_version": 2}}
    saved(tmp_path, tiny.causal_lm(), {"quant_method": "torchao", "quant_type": kind})
    with pytest.raises(
        ValueError, match="quantised with torchao, as Int4WeightOnlyConfig: expected its Int8Weight"
    ):
        check_quantised(named(tmp_path), "lora")


def test_a_run_on_bits_stopped_and_started_again_gives_the_same_bits(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits_model(tmp_path / "base", 4)
    there = (tmp_path / "base", material[1])
    flags = ["--train.tuning", "lora", "--reference.epochs=1"]
    run(there, tmp_path / "whole", *flags)
    stop_in(monkeypatch, "train sftmix", lambda: run(there, tmp_path / "r", *flags))
    run(there, tmp_path / "r", *flags)
    assert same(trained(tmp_path / "r"), trained(tmp_path / "whole"))
    assert same(trained(tmp_path / "r", "ntp"), trained(tmp_path / "whole", "ntp"))


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"quant_method": "gptq"}])
def test_full_tuning_of_bits_is_one_line_before_any_data(
    material: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    tiny.causal_lm().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    done = command("run", "--model", str(base), "--data", str(material[1]), "--run-dir", str(tmp_path / "r"))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()  # torchao says which of its libraries it cannot load
    assert lines[-1].startswith(f"sftmix: model.name: {base} is quantised with "), done.stderr
    assert sum(line.startswith("sftmix: ") for line in lines) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "r" / "tokens").exists() and "tokenising" not in done.stdout


def test_numbers_are_counted_and_norms_are_of_numbers(tmp_path: Path) -> None:
    original = bits_model(tmp_path, 4)
    model, _ = load_model(named(tmp_path), tuning="lora")
    apply_lora(model, tiny.config("train.tuning=lora", "lora.dora=true").lora)
    layers = merge_plan(model.base).layers.values()
    for layer in layers:
        weight = dequantised(layer.get_base_layer(), torch.float32)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, weight.norm(dim=1))
    share = trained_share(model)
    assert share.total - share.trainable == sum(weight.numel() for weight in original.parameters())
    assert share.adapted == sum(layer.in_features * layer.out_features for layer in layers)


def test_dora_on_8_bits_of_a_cpu_is_refused(tmp_path: Path) -> None:
    bits_model(tmp_path, 8)
    model, _ = load_model(named(tmp_path), tuning="lora")
    with pytest.raises(ValueError, match=r"lora\.dora: expected false with an 8-bit base on a CPU"):
        apply_lora(model, tiny.config("train.tuning=lora", "lora.dora=true").lora)


def test_exact_products_are_those_of_the_numbers(tmp_path: Path) -> None:
    bits_model(tmp_path, 8)
    model, _ = load_model(named(tmp_path), tuning="lora")
    layer = next(module for module in model.modules() if is_quantised(module))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ dequantised(layer, torch.float32).T
    with exact_products(model), torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    off = (layer(x) - expected).abs().max()
    assert off > 1e-4 * expected.abs().max()
