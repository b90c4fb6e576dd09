"""The files of an export beside those of its base: names, bytes, settings, tokenizer, code; with the public reports.

What reads the base model must read the export: an older transformers too, and code of the model's own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftmix.config import ModelConfig
from sftmix.evaluation.figures import sample_answers
from sftmix.model.load import load_model
from tests.recipe import tiny
from tests.recipe.model import architectures
from tests.recipe.model.roads import LORA, forget_code, logits, read, rewrite, road, save, values
from tests.recipe.model.test_load import REMOTE_CONFIG, REMOTE_MODEL

# dense, tied, transposed, mixtures under other names than in memory, state-space, hybrid, multimodal, float32 parts
GENERIC = """
    llama llama_tied gpt2 gemma2 mixtral qwen3_moe granitemoehybrid ernie4_5_moe mamba jamba nemotron_h qwen3_next
    gemma3 qwen3_5 llama4 flint
""".split()
# What transformers itself adds or moves when it reads and writes a configuration.
ALLOWED = {"dtype", "transformers_version", "_name_or_path"}
TOLD = {"is_local", "local_files_only"}  # of a tokenizer, by transformers


def differences(before: dict[str, Any], after: dict[str, Any], at: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *after} - ALLOWED):
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{at}{key}.")
        elif one != other:
            found.append(f"{at}{key}: {one!r} -> {other!r}")
    return found


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_of_an_untrained_model_is_its_base(name: str, dtype: str, tmp_path: Path) -> None:
    """huggingface/transformers#45357, #46167, #38403, sglang#38618, unsloth-zoo#149: names, dtypes, classes changed."""
    if architectures.ROWS[name].get("of", name) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    base = architectures.build(name, tmp_path / "b")
    if dtype == "bfloat16":  # keeps in float32 what the class does
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    found = road(base, tmp_path, f"model.dtype={dtype}", steps=0)
    before, after = values(base), values(found.model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    for file in ("config.json", "generation_config.json"):
        assert (base / file).exists() == (found.model / file).exists()
        if (base / file).exists():
            assert differences(read(base / file), read(found.model / file)) == []
    assert {path.name for path in base.iterdir()} == {path.name for path in found.model.iterdir()}
    one, other = read(base / "tokenizer_config.json"), read(found.model / "tokenizer_config.json")
    assert {k: v for k, v in other.items() if k not in TOLD} == {
        k: v for k, v in one.items() if k not in TOLD
    }
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (base / file).read_bytes() == (found.model / file).read_bytes()


# --- readers of before transformers 5 ---

ROPE = "rope_parameters"
OLDER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "yarn": ("llama", {"rope_theta": 1e6, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    "phi": ("phi", {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5000}),
    "gemma3_text": ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", OLDER)
def test_rotary_settings_keep_the_names_that_the_base_has(case: str, tmp_path: Path) -> None:
    """vllm-project/vllm#42624: rope_theta only inside rope_parameters; readers of the old name took 10000, silently."""
    name, settings = OLDER[case]
    rewrite(architectures.build(name, tmp_path / "b") / "config.json", [ROPE], **settings)
    found = road(tmp_path / "b", tmp_path / "1", lr=0.01)
    again = road(found.model, tmp_path / "2", lr=0.01)  # of an export as of any model
    told = AutoModelForCausalLM.from_pretrained(tmp_path / "b").config.rope_parameters
    for export in (found, again):
        config = read(export.model / "config.json")
        assert {key: config[key] for key in settings} == settings and ROPE in config
        assert export.plain().config.rope_parameters == told


def test_rotary_settings_of_a_part_keep_their_names(tmp_path: Path) -> None:
    base = architectures.build("gemma3", tmp_path / "b")
    text = read(base / "config.json")["text_config"]
    settings = {"rope_theta": 1e6, "rope_local_base_freq": 5e3}
    text = {key: value for key, value in text.items() if key != ROPE}
    rewrite(base / "config.json", text_config={**text, **settings})
    config = read(road(base, tmp_path, lr=0.01).model / "config.json")
    assert settings.items() <= config["text_config"].items() and not settings.keys() & config.keys()


@pytest.mark.parametrize("export", ["merged", "both"])
def test_a_tokenizer_keeps_the_class_that_the_base_names(export: str, tmp_path: Path) -> None:
    """unslothai/unsloth#8444, LlamaFactory#10310, ms-swift#8352: TokenizersBackend, which older servers do not know."""
    base = save(tiny.causal_lm(), tmp_path / "b")
    special = ["<|im_start|>", "<|im_end|>"]
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special}
    sides = {"padding_side": "left", "truncation_side": "left"}  # unslothai/unsloth#1006
    rewrite(
        base / "tokenizer_config.json", ["backend"], eos_token="w3", **older, **sides
    )  # unslothai/unsloth#5386
    found = road(base, tmp_path, *(LORA if export == "both" else ()), f"export={export}")
    for folder in (found.model, *([found.adapter] if export == "both" else [])):
        config = read(folder / "tokenizer_config.json")
        assert {key: config[key] for key in (*older, *sides)} == {**older, **sides}
        assert "extra_special_tokens" not in config
        one, other = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
        assert type(one) is type(other) and one.get_vocab() == other.get_vocab()
        assert one.special_tokens_map == other.special_tokens_map and other.eos_token == "w3"
        assert set(special) <= set(other.all_special_tokens)
        assert one("w1 <|im_end|> w2").input_ids == other("w1 <|im_end|> w2").input_ids


# --- templates and settings of generation ---


def _in_tokenizer(base: Path, template: Any) -> None:
    (base / "chat_template.jinja").unlink()
    rewrite(base / "tokenizer_config.json", chat_template=template)


def _beside(base: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(f"T{tiny.CHATML}")


TEMPLATES: dict[str, Any] = {
    "in the tokenizer's settings": lambda base: _in_tokenizer(base, tiny.CHATML),
    "named": lambda base: _in_tokenizer(
        base,
        [{"name": "default", "template": tiny.CHATML}, {"name": "tool_use", "template": f"T{tiny.CHATML}"}],
    ),
    "in a folder": _beside,
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_are_exported_wherever_they_stand(case: str, tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#8399, transformers#33459, Automodel#3256: the template was not among the saved files."""
    base = save(tiny.causal_lm(), tmp_path / "b")
    TEMPLATES[case](base)
    found = road(base, tmp_path, steps=0)
    one, other = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(found.model)
    assert one.chat_template and one.chat_template == other.chat_template


def test_processor_files_of_an_adapters_base_go_along(tmp_path: Path) -> None:
    """LlamaFactory#5749: a multimodal model without its processor files; here by the way of an adapter."""
    base = architectures.build("gemma3", tmp_path / "b")
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    for name in names:
        (base / name).write_text("{}")
    (base / "LICENSE").write_text("terms")
    first = road(base, tmp_path / "1", *LORA, "export=adapter")
    second = road(first.adapter, tmp_path / "2", lr=0.01)
    assert {*names, "LICENSE"} <= {path.name for path in second.model.iterdir()}
    assert values(second.model).keys() == values(base).keys()


@pytest.mark.parametrize("flags", [(), LORA, ("model.added_tokens=<a>",)], ids=["full", "lora", "added"])
def test_ends_and_settings_of_generation_are_kept(flags: tuple[str, ...], tmp_path: Path) -> None:
    """verl-project/verl#7198, EasyR1#11007: generation settings made anew, the list of end tokens lost."""
    base = save(tiny.causal_lm(), tmp_path / "b")
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "pad_token_id": 0, "suppress_tokens": [4]}
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 7]}))
    found = road(base, tmp_path, *flags, stop_ids=(9,))
    told = read(found.model / "generation_config.json")
    assert settings.items() <= told.items() and told["eos_token_id"] == [9, 2, 7]
    assert read(found.model / "config.json")["eos_token_id"] == [9, 2, 7]


def test_an_end_token_that_stands_in_the_text_model_alone_is_kept(tmp_path: Path) -> None:
    """verl-project/verl#7198 again: no settings of generation, and the end token in text_config."""
    base = architectures.build("gemma3", tmp_path / "b")
    (base / "generation_config.json").unlink()
    rewrite(base / "config.json", ["eos_token_id"])
    assert read(base / "config.json")["text_config"]["eos_token_id"] == 2
    found = road(base, tmp_path, stop_ids=(9,), lr=0.01)
    config = read(found.model / "config.json")
    assert config["text_config"]["eos_token_id"] == config["eos_token_id"] == [9, 2]
    assert read(found.model / "generation_config.json")["eos_token_id"] == [9, 2]


# --- code of the model's own ---

HELPED = REMOTE_MODEL.replace(
    "from .configuration_tiny import TinyConfig",
    "from .configuration_tiny import TinyConfig\nfrom .first import bend",
).replace("torch.tanh(", "bend(")
TABLE = "self.register_buffer('table', torch.arange(64.0), persistent=False)"
AGAIN = """
    def _init_weights(self, module):
        if isinstance(module, Body):
            module.table.copy_(torch.arange(64.0))
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class TinyTokenizer(PreTrainedTokenizerFast):
    own = 7
"""


def remote(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str = HELPED) -> Path:
    """A model and a tokenizer with code beside them; transformers takes the code anew in each test."""
    forget_code(monkeypatch)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    tiny.tokenizer().save_pretrained(folder)
    auto = {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}
    rewrite(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="TinyTokenizer")
    (folder / ".cache").mkdir()
    code = {
        "tokenization_tiny.py": TOKENIZER, "configuration_tiny.py": REMOTE_CONFIG, "modeling_tiny.py": model,
        "first.py": "from .second import bend\n", "second.py": "import torch\nbend = torch.tanh\n", ".cache/x.py": "",
    }  # fmt: skip
    for name, text in code.items():
        (folder / name).write_text(text)
    auto = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny_remote", "auto_map": auto}))
    draw = torch.Generator().manual_seed(0)
    shapes = {"body.embed.weight": (61, 16), "body.blocks.0.weight": (16, 16), "lm_head.weight": (61, 16)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    weights["body.blocks.0.bias"] = torch.randn((16,), generator=draw)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("flags", [(), (*LORA, "export=both")], ids=["full", "lora"])
def test_code_of_the_models_own_goes_along(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/transformers#20884, #46165, SkyRL#1726: auto_map without the files; and a class without generate."""
    found = road(
        remote(tmp_path / f"code{len(flags)}", monkeypatch), tmp_path, "model.trust_remote_code=true", *flags
    )
    expected = logits(found.live.base)
    assert not list(found.model.rglob(".*")) and sample_answers(found.live, tiny.tokenizer(), []) == []
    shutil.move(found.model, tmp_path / f"moved{len(flags)}")
    shutil.rmtree(found.base)
    shutil.rmtree(tmp_path / "modules")
    forget_code(monkeypatch)
    moved = tmp_path / f"moved{len(flags)}"
    plain = AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=True)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(moved, trust_remote_code=True).own == 7
    assert "--" not in (moved / "config.json").read_text()  # no way back to another place


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_buffer_that_is_in_no_file_has_its_values(
    made_anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unslothai/unsloth#4112, huggingface/transformers#48932: such buffers were what happened to be in memory."""
    code = REMOTE_MODEL.replace("        self.post_init()", f"        {TABLE}\n        self.post_init()", 1)
    if made_anew:
        code = code.replace("class Body(PreTrainedModel):", f"class Body(PreTrainedModel):\n{AGAIN}")
    base = remote(tmp_path / f"buffer{made_anew:d}", monkeypatch, code)
    source = ModelConfig(name=str(base), dtype="float32", trust_remote_code=True)
    if made_anew:
        assert torch.equal(load_model(source)[0].base.body.table, torch.arange(64.0))
        return
    empty = torch.empty_like  # memory that nobody has written to might hold the right values by chance
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty(*args, **options).fill_(9))
    with pytest.raises(ValueError, match=r"model.name: expected body.table, which is not in the files of"):
        load_model(source)
