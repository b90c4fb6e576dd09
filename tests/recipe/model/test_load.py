"""Loading: data types as transformers gives them, no weight at random, and one line for whatever cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.config import ModelConfig
from sftmix.model import load, source, weight_files
from sftmix.model.load import load_model
from sftmix.model.tokenizer import load_tokenizer
from tests.recipe import tiny
from tests.recipe.model.roads import forget_code

ERNIE = {
    **tiny.GATED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 1,
    "moe_layer_end_index": 1, "moe_num_shared_experts": 1,
}  # fmt: skip


def saved(folder: Path, kind: str = "llama", **options: Any) -> Path:
    """A tiny model and its tokenizer in ``folder``."""
    tiny.causal_lm(kind).save_pretrained(folder, **options)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def named(folder: Path | str, *flags: str) -> ModelConfig:
    return tiny.config(f"model.name={folder}", *flags).model


def refused(model: ModelConfig) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ValueError) as caught:
        load_model(model)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("model.")
    return line


def configured(folder: Path, **changes: Any) -> None:
    """Change values of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- data types ---


def of_kind(folder: Path, kind: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "kind,values,kept",
    [
        ("ernie4_5_moe", ERNIE, ("gate.weight", "e_score_correction_bias")),
        ("flint", tiny.GATED, ("sinks",)),
    ],
)
def test_weights_that_a_class_keeps_in_float32_are_not_rounded(
    tmp_path: Path, kind: str, values: dict[str, Any], kept: tuple[str, ...]
) -> None:
    if kind not in AutoConfig.for_model.__globals__["CONFIG_MAPPING"]:
        pytest.skip(f"this transformers has no {kind}")
    original = dict(of_kind(tmp_path, kind, values).named_parameters())
    model, _ = load_model(named(tmp_path, "model.dtype=bfloat16"))
    found = {name.removeprefix("model."): parameter for name, parameter in model.named_parameters()}
    assert {name for name, parameter in found.items() if parameter.dtype == torch.float32} == {
        name for name in found if name.endswith(kept)
    }
    assert any(name.endswith(kept[0]) for name in found) and model.dtype == torch.bfloat16
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, original[name].to(parameter.dtype), rtol=0, atol=0)


def test_files_of_several_float_types_become_the_runs(tmp_path: Path) -> None:
    weights = load_file(saved(tmp_path) / "model.safetensors")
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(sorted(weights.items()))}
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model, _ = load_model(named(tmp_path, f"model.dtype={name}"))
        for key, parameter in model.base.named_parameters():
            assert parameter.dtype == dtype and torch.equal(parameter, mixed[key].to(dtype))


def test_what_a_loader_left_in_another_type_is_cast_but_not_what_is_declared(tmp_path: Path) -> None:
    model = of_kind(tmp_path, "ernie4_5_moe", ERNIE)
    load.cast_as_declared(model, torch.bfloat16)
    kinds = {name.rpartition("mlp.")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["gate.weight"] == torch.float32 and kinds["gate_proj.weight"] == torch.bfloat16


# --- no weight at random, none left out without a word ---


def test_missing_weights_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    configured(saved(tmp_path), num_hidden_layers=3)
    line = refused(named(tmp_path))
    assert "the files lack 9: model.layers.2.input_layernorm.weight, " in line and line.count("layers.2") == 3


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    configured(saved(tmp_path), intermediate_size=32)
    line = refused(named(tmp_path))
    assert "6 of other shapes: model.layers.0.mlp.down_proj.weight is [16, 24], not [16, 32]" in line


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load_model(named(tmp_path))[0].is_tied


def test_weights_without_a_place_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configured(saved(tmp_path), num_hidden_layers=1)
    load_model(named(tmp_path))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not part of" in line]
    assert line.startswith(
        "model.name: 9 weights in the files are not part of LlamaForCausalLM: not trained, not"
    )
    assert line.endswith("model.layers.1.mlp.gate_proj.weight and 6 more")


def test_weights_that_a_class_passes_over_are_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As layers for predicting several tokens at once; but not masks and constants of old files."""
    weights = load_file(saved(tmp_path) / "model.safetensors")
    extra = {"mtp.fc.weight": torch.ones(2, 3), "mtp.mask": torch.ones(2, 2, dtype=torch.bool)}
    extra["mtp.inv_freq"] = torch.ones(4)
    save_file({**weights, **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    load_model(named(tmp_path))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not part of" in line]
    assert "1 weights in the files" in line and line.endswith("not exported: mtp.fc.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path: Path, value: float) -> None:
    weights = load_file(saved(tmp_path) / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinite ones in model.layers.1.mlp.up_proj.weight" in refused(named(tmp_path))


def test_large_weights_whose_sum_overflows_are_numbers() -> None:
    module = torch.nn.Linear(4, 4)
    with torch.no_grad():
        module.weight.fill_(3e38)
    weight_files.check_finite(named("x"), module)


# --- what cannot be read ---


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(folder, max_shard_size="5KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def break_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")


def only_tokenizer_model(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"nothing")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None  # type: ignore[func-returns-value]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "bytes in {folder}/model.safetensors, as it says itself, got"),
    "empty file": (write("model.safetensors", " "), "got another or one cut short (1 bytes)"),
    "not safetensors": (write("model.safetensors", "x" * 3000), "got another or one cut short (3000 bytes)"),
    "shard": (lose_shard, "expected all 6 files that {folder}/model.safetensors.index.json names, got 1 missing"),
    "index": (break_index, "expected a JSON object with weight_map in {folder}/model.safetensors.index.json"),
    "no weights": (remove("model.safetensors"), "expected weights (*.safetensors or *.bin) in {folder}, got none"),
    "no config": (remove("config.json"), "expected a folder with config.json, got {folder} without one"),
    "not JSON": (write("config.json", "{nope"), "expected JSON in {folder}/config.json"),
    "a list": (write("config.json", "[1]"), "expected a JSON object in {folder}/config.json, got a list"),
    "no type": (write("config.json", "{}"), "expected a configuration that transformers can read, got {folder}"),
    "unknown type": (write("config.json", '{"model_type": "zork"}'), "knows, got zork in {folder}"),
    "not causal": (write("config.json", '{"model_type": "t5"}'), "causal language model, got {folder} (T5Config)"),
    "no tokenizer": (remove("tokenizer.json"), "expected a model with a tokenizer, got {folder} without one"),
    "adapter": (adapter, "some/base is the base that the adapter {folder} names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    folder = saved(tmp_path / "model")
    spoil, expected = BROKEN[case]
    spoil(folder)
    assert expected.format(folder=folder) in refused(named(folder))


def test_places_that_hold_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "got no folder /no/such/place" in refused(named("/no/such/place"))
    assert f"got {tmp_path}, an empty one" in refused(named(tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"abc")
    assert "model.gguf_file=weights.gguf" in refused(named(tmp_path))
    line = refused(named(tmp_path, "model.gguf_file=other.gguf"))
    assert line.startswith("model.gguf_file: expected one of") and "(weights.gguf)" in line
    assert "not a GGUF file" in refused(named(tmp_path, "model.gguf_file=weights.gguf"))
    assert "the file's name as model.gguf_file" in refused(named(tmp_path / "weights.gguf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = source.explained(named("some/model"), "a tokenizer", OSError("We couldn't connect\nto the hub"))
    assert "some/model (HF_HUB_OFFLINE is set and it is not in the cache)" in line


@pytest.mark.parametrize(
    "error,expected",
    [
        (ModuleNotFoundError("No module named 'zork'"), "needs a package that is not installed (No module named"),
        (ValueError("This requires it: `pip install zork`"), "needs a package that is not installed"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "does not fit into memory (CUDA out of memory.)"),
        (RuntimeError("[enforce fail] can't allocate memory: 8 bytes"), "does not fit into memory"),
        (MemoryError(), "does not fit into memory (MemoryError)"),
        (PermissionError(13, "Permission denied"), "Permission denied: change their permissions"),
        (KeyError("x" * 500), "KeyError: '" + "x" * 198 + "…)"),
    ],
)  # fmt: skip
def test_errors_of_packages_become_one_line(tmp_path: Path, error: Exception, expected: str) -> None:
    with pytest.raises(ValueError) as caught, source.reading(named(tmp_path), "weights"):
        raise error
    line = str(caught.value)
    assert line.startswith("model.name: ") and expected in line and "\n" not in line
    assert caught.value.__cause__ is error


def test_a_tokenizer_that_needs_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tokenizer_model(saved(tmp_path))
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    error = ValueError("Couldn't instantiate the backend tokenizer from one of:")
    line = source.explained(named(tmp_path), "a tokenizer", error)
    assert f"the tokenizer of {tmp_path} needs sentencepiece, which is not installed" in line
    with pytest.raises(ValueError, match=r"^model\.name: .*tokenizer"):
        load_tokenizer(named(tmp_path))


def test_an_attention_that_is_not_there_names_its_knob(tmp_path: Path) -> None:
    line = refused(named(saved(tmp_path), "model.attn_implementation=zork"))
    assert line.startswith("model.attn_implementation: ") and "got zork" in line


# --- code of the model's own ---

REMOTE_CONFIG = """
from transformers import PretrainedConfig
class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"
    def __init__(self, vocab_size=61, hidden_size=16, num_hidden_layers=1, **rest):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**rest)
"""
REMOTE_MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from .configuration_tiny import TinyConfig
class Body(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(1))
        self.post_init()
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.embed(input_ids)
        return BaseModelOutput(last_hidden_state=hidden + torch.tanh(self.blocks[0](hidden)))
class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "body"
    def __init__(self, config):
        super().__init__(config)
        self.body = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.body.embed
    def get_output_embeddings(self):
        return self.lm_head
    def set_output_embeddings(self, head):
        self.lm_head = head
    def get_decoder(self):
        return self.body
    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None):
        logits = self.lm_head(self.body(input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model whose code stands beside it."""
    forget_code(monkeypatch)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    tiny.tokenizer().save_pretrained(folder)
    (folder / "configuration_tiny.py").write_text(REMOTE_CONFIG)
    (folder / "modeling_tiny.py").write_text(REMOTE_MODEL)
    auto = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny_remote", "auto_map": auto}))
    generator = torch.Generator().manual_seed(0)
    shapes = {"body.embed.weight": (61, 16), "body.blocks.0.weight": (16, 16), "body.blocks.0.bias": (16,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["lm_head.weight"] = torch.randn((61, 16), generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_the_models_own_runs_only_where_the_knob_says_so(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    line = refused(named(remote))
    assert "--model.trust_remote_code true" in line and f"runs the code in {remote}" in line
    assert "configuration_tiny" not in "".join(name for name in __import__("sys").modules)


def test_a_model_with_code_of_its_own_trains(remote: Path) -> None:
    model, _ = load_model(named(remote, "model.trust_remote_code=true"))
    assert type(model.base).__name__ == "TinyModel" and model.vocab_size == 61
    ids = torch.arange(40).view(4, 10) % 61
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "rows": torch.arange(39)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**batch, target=ids.flatten()[1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
