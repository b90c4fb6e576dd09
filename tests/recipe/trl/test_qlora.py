"""QLoRA inside TRL: 4-bit bases of bitsandbytes keep their bits, and train as the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from sftmix.model.load import load_model
from sftmix.model.quantised import dequantised, is_quantised, keep_bits
from tests.recipe.model.test_quantised import bits_model, named
from tests.recipe.trl.small import assert_close, trainer, weights

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a tiny model in nf4 with double quantisation."""
    bits_model(tmp_path / "base", 4, bnb_4bit_use_double_quant=True)
    return tmp_path / "base"


def on_bits(base: Path, *, layout: bool = False) -> Any:
    """The model on its bits; ``layout``: it also evaluates on them as they are."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if layout:
        keep_bits(model)
    return model


def on_numbers(base: Path) -> Any:
    """The model that the bits stand for."""
    from transformers import AutoModelForCausalLM

    plain, bits = AutoModelForCausalLM.from_pretrained(base / "plain"), on_bits(base)
    for name, module in bits.named_modules():
        if is_quantised(module):
            plain.get_submodule(name).weight.data = dequantised(module, torch.float32)
    return plain


def qlora(folder: Path, model: Any, **changes: Any) -> Any:
    torch.manual_seed(0)  # peft draws the adapters' first factor
    told = {"num_train_epochs": 4, "gradient_checkpointing": False, **changes}
    return trainer(folder, model=model, peft_config=LoraConfig(**LORA), **told)


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(model).items() if "lora_" in name}


def bits_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if is_quantised(m)}


def test_bits_train_as_the_numbers_they_stand_for(base: Path, tmp_path: Path) -> None:
    """Every step, in float32: TRL rounds the adapters of a quantised model to bfloat16 and those of others not."""
    found, plain = qlora(tmp_path / "bits", on_bits(base)), qlora(tmp_path / "numbers", on_numbers(base))
    for trained in (found, plain):
        assert len(adapters(trained.model)) == 28
        for name, parameter in trained.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16).float()
    assert len(bits_of(found.model)) == 14 and not bits_of(plain.model)
    found.train()
    plain.train()
    ours, theirs = ([r["ntp_loss"] for r in t.state.log_history if "ntp_loss" in r] for t in (found, plain))
    assert ours == pytest.approx(theirs, rel=2e-5) and len(ours) == 12
    assert_close(adapters(found.model), adapters(plain.model), 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_falls_and_the_base_stays(base: Path, tmp_path: Path, checkpointing: bool) -> None:
    """As TRL prepares it; with activations made again too."""
    found = qlora(tmp_path, on_bits(base), gradient_checkpointing=checkpointing, num_train_epochs=6)
    before = bits_of(found.model)
    found.train()
    losses = [r["ntp_loss"] for r in found.state.log_history if "ntp_loss" in r]
    assert losses[-1] < losses[0] - 0.3
    after = bits_of(found.model)
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    head = dict(found.model.get_base_model().named_parameters())["lm_head.weight"]
    assert torch.equal(head, dict(on_bits(base).named_parameters())["lm_head.weight"])


def test_a_resumed_run_ends_in_the_same_bits(base: Path, tmp_path: Path) -> None:
    told = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole, again = (qlora(tmp_path / name, on_bits(base), **told) for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert {value.dtype for value in adapters(again.model).values()} == {
        torch.bfloat16
    }  # peft would widen them
    assert_close(adapters(again.model), adapters(whole.model), 0)
    assert again.dynamics_rows == whole.dynamics_rows


def test_a_reference_run_puts_the_adapters_back(base: Path, tmp_path: Path) -> None:
    online = qlora(tmp_path / "online", on_bits(base), reference="online", num_train_epochs=1)
    online.train()
    path = str(tmp_path / "online" / "reference" / "dynamics.parquet")
    given = qlora(tmp_path / "given", on_bits(base), dynamics=path, num_train_epochs=1)
    given.train()
    assert_close(adapters(online.model), adapters(given.model), 0)


def test_what_it_saves_is_an_adapter_of_the_bits_and_merges_into_their_numbers(
    base: Path, tmp_path: Path
) -> None:
    found = qlora(tmp_path / "run", on_bits(base))
    found.train()
    found.save_model(str(tmp_path / "adapter"))
    ids = torch.randint(7, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = PeftModel.from_pretrained(on_bits(base, layout=True), tmp_path / "adapter").eval()
        for name, parameter in found.model.named_parameters():
            parameter.data = (
                parameter.data.float() if "lora_" in name else parameter.data
            )  # as peft reads them
        expected = found.model.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0)
        merged, _ = load_model(
            named(tmp_path / "adapter"), tuning="lora"
        )  # our own door to a peft adapter's folder
        assert not any(is_quantised(module) for module in merged.modules())
        torch.testing.assert_close(merged.base(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_that_an_evaluation_repacked_are_refused(base: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks in eval mode on a CPU with bfloat16 products; such weights pass no gradient on."""
    model = on_bits(base)
    layers = [module for module in model.modules() if is_quantised(module)]
    layers[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError,
        match=r"expected 4-bit weights as they were loaded, got model\.layers\.0\.self_attn\.o_proj",
    ):
        qlora(tmp_path, model)
