"""What generation reads in an exported model: the trained stop tokens, and all else as the base model had it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftmix.data.template import use_chat_template
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.export import merge_and_export, stops
from sftmix.model.identity import model_identity
from tests.recipe import tiny


def model(generation: Any = None, config: Any = None, **settings: Any) -> SFTMixModel:
    """A tiny model with end tokens of generation and of its configuration, and other settings of generation."""
    built = tiny.causal_lm()
    built.config.eos_token_id = config
    built.generation_config = GenerationConfig(eos_token_id=generation, **settings)
    return install_head(built)


@pytest.mark.parametrize(
    "generation,config,trained,expected",
    [
        (7, 2, (9,), [9, 7, 2]), ([7, 9], 2, (9, 2), [9, 2, 7]), (None, None, (9,), 9), (9, 9, (9,), 9),
        ([7, 8], 8, (), [7, 8]), (7, 2, (), 7),
    ],
)  # fmt: skip
def test_the_trained_stop_comes_first_and_the_old_ones_stay(
    tmp_path: Path, generation: Any, config: Any, trained: tuple[int, ...], expected: Any
) -> None:
    found = model(generation, config, pad_token_id=3)
    merge_and_export(found, tiny.tokenizer(), tmp_path / "out", stop_ids=trained)
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert saved.eos_token_id == expected and saved.pad_token_id == 3
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == (expected if trained else config)
    assert found.base.config.eos_token_id == config  # the trained model itself is left alone
    assert found.base.generation_config.eos_token_id == generation


def test_the_exported_model_stops_where_training_ended_its_answers(tmp_path: Path) -> None:
    found = model()
    prompt = torch.tensor([[5, 8, 9]])
    free = found.base.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    stop = free[4]
    merge_and_export(found, tiny.tokenizer(), tmp_path / "out", stop_ids=(stop,))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        plain.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 3:].tolist()
        == (free[: free.index(stop) + 1])
    )


def test_settings_of_generation_are_kept(tmp_path: Path) -> None:
    found = model(2, 2, do_sample=True, temperature=0.6, top_p=0.95, repetition_penalty=1.1)
    merge_and_export(found, tiny.tokenizer(), tmp_path / "out", stop_ids=(9,))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [9, 2]
    kept = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1}
    assert {key: saved[key] for key in kept} == kept


def test_settings_that_transformers_refuses_to_save_do_not_lose_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A temperature without sampling, as published models have it."""
    found = model(2, 2, temperature=0.9, top_p=0.6, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        found.base.generation_config.save_pretrained(tmp_path / "refused")
    merge_and_export(found, tiny.tokenizer(), tmp_path / "out", stop_ids=(9,))
    assert "generation settings: kept as the base model has them" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["temperature"], saved["top_p"]) == ([9, 2], 0.9, 0.6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.generation_config.temperature == 0.9 and plain.generation_config.eos_token_id == [9, 2]
    assert all(
        torch.equal(value, found.base.state_dict()[name]) for name, value in plain.state_dict().items()
    )


def test_the_template_used_in_training_is_exported_and_the_tokenizer_is_as_it_was(tmp_path: Path) -> None:
    other = tiny.CHATML.replace("message['role']", "'w3 ' + message['role']")
    (tmp_path / "other.jinja").write_text(other)
    tokenizer = tiny.tokenizer()
    use_chat_template(tokenizer, tmp_path / "other.jinja")
    merge_and_export(model(2, 2), tokenizer, tmp_path / "out", stop_ids=(9,))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == other and loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<pad>"


def test_a_text_model_inside_another_has_its_stop_tokens_read() -> None:
    class Text:
        eos_token_id = (4, 5)

    class Outer:
        eos_token_id = None

        def get_text_config(self) -> Any:
            return Text

    class Found:
        config, generation_config = Outer(), None

    assert stops(Found, (7, 5)) == [7, 5, 4]


def test_a_model_is_its_files_wherever_they_lie(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tiny.causal_lm().save_pretrained(one)
    shutil.copytree(one, two)
    assert model_identity(str(one)) == model_identity(str(two))
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}, indent=8))
    assert model_identity(str(one)) == model_identity(str(two))
    (two / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert model_identity(str(one)) != model_identity(str(two))
    assert model_identity("org/model") != model_identity("org/model", revision="v2")
    assert model_identity("org/model") == model_identity("org/model", revision="main")


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_another_fine_tune_of_one_tensor_is_another_model(tmp_path: Path, name: str) -> None:
    """Same names, shapes and size: only the numbers of one tensor differ."""
    found = tiny.causal_lm()
    found.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        found.state_dict()[name].add_(1e-3)
    found.save_pretrained(tmp_path / "two")
    assert model_identity(str(tmp_path / "one")) != model_identity(str(tmp_path / "two"))


def test_a_large_file_is_sampled_in_every_tensor(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.zeros(40_000) for i in range(8)}
    seen = set()
    for change in [None, *tensors]:
        save_file(
            {k: v + 1 if k == change else v for k, v in tensors.items()}, tmp_path / "model.safetensors"
        )
        seen.add(model_identity(str(tmp_path)))
    assert len(seen) == 9


def test_padding_that_is_also_a_stop_does_not_empty_the_answers(tmp_path: Path) -> None:
    found = model(None, None)
    prompt = torch.tensor([[5, 8, 9], [0, 5, 8]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    free = found.base.generate(
        prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )[0, 3:]
    stop = int(free[4])
    found.base.generation_config.pad_token_id = stop
    merge_and_export(found, tiny.tokenizer(), tmp_path / "out", stop_ids=(stop,))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.generation_config.pad_token_id == stop
    answer = plain.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert answer[: answer.index(stop)] == free.tolist()[: free.tolist().index(stop)] != []
