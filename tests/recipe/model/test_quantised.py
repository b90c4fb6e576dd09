"""Quantised bases: exact numbers where they are dequantised, LoRA on the bits of bitsandbytes, the others refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sftmix.model import quantised
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.load import load_model
from sftmix.model.lora import apply_lora
from sftmix.model.quantised import check_quantised, dequantised, is_quantised
from tests.recipe import tiny

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def saved(folder: Path, model: Any, settings: dict[str, Any] | None) -> None:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    if settings is not None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def named(folder: Path, dtype: str = "float32") -> Any:
    return tiny.config(f"model.name={folder}", f"model.dtype={dtype}").model


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of blocks of 16 by 16, and the numbers that they stand for."""
    rows, columns = (size // 16 for size in weight.shape)
    blocks = weight.view(rows, 16, columns, 16)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view_as(weight), scale, (codes.float() * scale[:, None, :, None]).view_as(weight)


def in_mxfp4(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes [E, out, in / 32, 16], scales [E, out, in / 32], and their numbers [E, in, out]."""
    experts, inner, outer = shape
    codes = torch.randint(16, (experts, outer, inner // 32, 32), generator=generator)
    scales = torch.randint(120, 126, (experts, outer, inner // 32), generator=generator)
    numbers = torch.cat((FP4, -FP4))[codes] * torch.exp2(scales.float() - 127)[..., None]
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, scales.to(torch.uint8), numbers.view(experts, outer, inner).transpose(1, 2)


def fp8_model(folder: Path) -> dict[str, Tensor]:
    """A model in fp8, and the numbers that its weights stand for."""
    saved(folder, tiny.causal_lm(hidden_size=32, intermediate_size=64), FP8)
    files, numbers = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        files[name] = numbers[name] = weight
        if "proj" in name:
            files[name], files[f"{name}_scale_inv"], numbers[name] = in_fp8(weight)
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    return numbers


def mxfp4_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 2}
    monkeypatch.setitem(tiny.ARCHITECTURES, "gpt_oss", {**tiny.GATED, **sizes, "num_experts_per_tok": 1})
    saved(folder, tiny.causal_lm("gpt_oss"), MXFP4)
    files, numbers, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            files[f"{name}_blocks"], files[f"{name}_scales"], numbers[name] = in_mxfp4(
                weight.shape, generator
            )
        else:
            files[name] = numbers[name] = weight
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    return numbers


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_and_mxfp4_become_the_numbers_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, dtype: str
) -> None:
    numbers = fp8_model(tmp_path) if kind == "fp8" else mxfp4_model(tmp_path, monkeypatch)
    check_quantised(named(tmp_path), "full")
    model, _ = load_model(named(tmp_path, dtype))
    wanted = getattr(torch, dtype)
    for name, parameter in model.base.named_parameters():
        assert parameter.dtype == wanted and torch.equal(parameter, numbers[name].to(wanted)), name
    assert len(dict(model.base.named_parameters())) == len(numbers)
    assert not hasattr(model.base.config, "quantization_config")
    assert f"quantised with {kind}: dequantised to {dtype}, trained and exported" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings,kind",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"bits": 3}, "unnamed"),
    ],
)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_other_kinds_are_refused_by_name_before_weights_are_read(
    tmp_path: Path, settings: dict[str, Any], kind: str, tuning: str
) -> None:
    saved(tmp_path, tiny.causal_lm(), settings)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    for call in (check_quantised, lambda model, tuning: load_model(model, tuning=tuning)):
        with pytest.raises(ValueError) as caught:
            call(named(tmp_path), tuning)
        line = str(caught.value)
        assert f"is quantised with {kind}, which cannot be trained here: expected a model without" in line
        assert line.startswith("model.name: ") and line.endswith("one of mxfp4, fp8, bitsandbytes, torchao")


def test_settings_in_a_nested_configuration_are_found() -> None:
    text = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    whole = SimpleNamespace(get_text_config=lambda: text)
    assert quantised.kind_of(quantised.quantisation(whole)) == "gptq"


def test_bitsandbytes_needs_lora_the_package_and_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, tiny.causal_lm(), {"load_in_4bit": True})
    with pytest.raises(ValueError, match=r"weights stay frozen: expected train\.tuning=lora"):
        check_quantised(named(tmp_path), "full")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantised with bitsandbytes, which is not installed: install it"):
        check_quantised(named(tmp_path), "lora")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: "found")
    check_quantised(named(tmp_path), "lora")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cannot be sharded: expected one process, got 2"):
        check_quantised(named(tmp_path), "lora")


# --- with bitsandbytes ---


def bits_model(folder: Path, bits: int, **options: Any) -> Any:
    """A model in the files of bitsandbytes; returned is the one it was made from."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    original = tiny.causal_lm(hidden_size=64, intermediate_size=128)
    saved(folder / "plain", original, None)
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    settings = BitsAndBytesConfig(**kind, **options)
    quantised_model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=settings)
    saved(folder, quantised_model, None)
    return original


def as_plain(model: SFTMixModel, original: Any, dtype: torch.dtype) -> SFTMixModel:
    """A model of the numbers that ``model`` holds as bits."""
    plain = copy.deepcopy(original).to(dtype)
    for name, module in model.base.named_modules():
        if is_quantised(module):
            plain.get_submodule(name).weight.data = dequantised(module, dtype)
    return install_head(plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_bits_train_as_on_the_numbers_they_stand_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    original = bits_model(tmp_path, bits)
    capsys.readouterr()
    model, _ = load_model(named(tmp_path), tuning="lora")
    told = capsys.readouterr()
    assert f"quantised with bitsandbytes, {bits} bits: kept so and frozen" in told.out
    assert ("round activations" in told.out) == (bits == 8) and "inputs will be cast" not in told.err
    held = [module for module in model.modules() if is_quantised(module)]
    assert len(held) == 14 and not any(module.weight.is_floating_point() for module in held)  # type: ignore[union-attr,operator]
    plain = as_plain(model, original, torch.float32)
    first, before = held[0], held[0].weight.detach().clone()  # type: ignore[union-attr,operator]
    off = (dequantised(first, torch.float32) - original.model.layers[0].self_attn.q_proj.weight).abs().max()
    assert 0 < off < (0.05 if bits == 4 else 0.005)
    ids = torch.randint(61, (4, 10), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "rows": torch.arange(39)}
    curves = []
    for one in (model, plain):
        apply_lora(one, tiny.config("train.tuning=lora").lora, seed=3)
        one.train()
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(10):
            loss = one(**batch, target=ids.flatten()[1:]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][-1] < 0.5 * curves[0][0]
    # 8-bit products round the activations too, 4-bit ones do not.
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5 if bits == 4 else 2e-2, atol=0)
    assert torch.equal(first.weight, before)  # type: ignore[arg-type]


def test_bits_of_a_head_are_refused(tmp_path: Path) -> None:
    bits_model(tmp_path, 4, llm_int8_skip_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="expected a head and an embedding that are not quantised"):
        load_model(named(tmp_path), tuning="lora")


def test_only_bits_are_dequantised() -> None:
    with pytest.raises(ValueError, match="module: expected a quantised weight, got Linear"):
        dequantised(torch.nn.Linear(2, 2), torch.float32)
