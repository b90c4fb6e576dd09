"""Public reports of the kind "the exported model is not the model that was trained", each tried on the product.

A test names the report (repository and number) and its symptom; what it then checks is ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.config import ModelConfig
from sftmix.model.load import load_model
from tests.recipe import tiny
from tests.recipe.model import architectures, experts
from tests.recipe.model.roads import LORA, logits, read, road, save, values
from tests.recipe.model.test_quantised import bits_model, fp8_model, mxfp4_model

EXPERTS = "lora.target_modules=q_proj,experts.gate_up_proj,experts.down_proj"


def small(kind: str, folder: Path, **changes: Any) -> Path:
    return save(tiny.causal_lm(kind, **changes), folder)


def mixture(kind: str, folder: Path, **changes: Any) -> Path:
    """A mixture of ``experts.CONFIGS`` with other sizes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**experts.CONFIGS[kind], **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return save(model, folder)


# --- ties, heads and vocabularies ---


@pytest.mark.parametrize("names", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
def test_a_tied_pair_trained_whole_stays_one_tensor(names: str, tmp_path: Path) -> None:
    """huggingface/transformers#45127, peft#2777: both trained apart, and one put over the other on reading."""
    found = road(
        small("qwen3", tmp_path / "b"), tmp_path, *LORA, f"lora.modules_to_save={names}", "export=both"
    )
    plain = found.plain()
    assert found.live.is_tied and plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in found.changed()
    found.with_peft()


@pytest.mark.parametrize(
    "names,why", [("lm_head", "ties to the input embedding"), ("embed_tokens", "an embedding")]
)
def test_no_adapter_on_half_a_tie(names: str, why: str, tmp_path: Path) -> None:
    """huggingface/peft#2018: an adapter on the head was merged into the input embedding too."""
    base = small("gemma2", tmp_path / "b")
    with pytest.raises(ValueError, match=f"lora.target_modules: expected .*, got {names}, .*{why}"):
        road(base, tmp_path, *LORA, f"lora.target_modules=q_proj,{names}")


def test_a_tied_model_is_stored_once(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#10560: both matrices of a tie stood in the files."""
    found = road(small("qwen3", tmp_path / "b"), tmp_path)
    found.plain()
    assert [name for name in values(found.model) if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight"
    ]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (found.base, found.model)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "flags", [(), (*LORA, "lora.modules_to_save=embed_tokens,lm_head")], ids=["full", "lora"]
)
def test_a_padded_embedding_keeps_its_rows(flags: tuple[str, ...], tmp_path: Path) -> None:
    """huggingface/transformers#32852: resizing to the tokenizer's length cut the padding off and moved rows."""
    found = road(small("llama", tmp_path / "b", vocab_size=128), tmp_path, "model.added_tokens=<a>", *flags)
    plain, name = found.plain(), "model.embed_tokens.weight"
    assert plain.config.vocab_size == len(values(found.model)[name]) == 128
    before, after = values(found.base)[name], values(found.model)[name]
    assert torch.equal(before[tiny.VOCAB :], after[tiny.VOCAB :])  # no example names them
    assert not torch.equal(before, after)


def test_a_grown_vocabulary_is_told_to_every_part_of_the_configuration(tmp_path: Path) -> None:
    """huggingface/transformers#20043 and its kind: a nested vocab_size that stayed."""
    found = road(
        architectures.build("gemma3", tmp_path / "b"), tmp_path, "model.added_tokens=<a>,<b>", lr=0.01
    )
    assert read(found.model / "config.json")["text_config"]["vocab_size"] == tiny.VOCAB + 2
    found.plain()


# --- adapters ---


@pytest.mark.parametrize(
    "kind,rank,changes",
    [
        ("qwen3_moe", 4, {"num_experts": 6, "num_experts_per_tok": 3}),
        (
            "qwen3_moe",
            6,
            {"num_experts": 6, "num_experts_per_tok": 3},
        ),  # a mix-up of both would have legal shapes
        ("qwen3_moe", 3, {"moe_intermediate_size": 16}),  # square, where a wrong transpose raises nothing
        ("qwen3_moe", 3, {"moe_intermediate_size": 4}),
        ("qwen3_moe", 3, {"moe_intermediate_size": 24}),
        ("gpt_oss", 3, {"intermediate_size": 8}),  # [in, out], and 2 I = H
        ("gpt_oss", 3, {"intermediate_size": 16}),
        (
            "mixtral",
            6,
            {"num_local_experts": 6, "num_experts_per_tok": 3},
        ),  # stored expert by expert as w1, w2, w3
    ],
)
def test_every_expert_is_merged_as_peft_does(
    kind: str, rank: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """unslothai/unsloth#5410, #5403, #6930, unsloth-zoo#779: experts not merged, transposed, or mixed up."""
    base = mixture(kind, tmp_path / "b", **changes)
    found = road(base, tmp_path, "train.tuning=lora", f"lora.rank={rank}", EXPERTS, "export=both", steps=4)
    weights = {name for name in values(base) if ".experts." in name and not name.endswith("bias")}
    assert weights and weights <= found.changed()
    plain, merged = found.plain().state_dict(), found.with_peft().merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["phimoe", "minimax", "granitemoe"])
def test_converted_experts_keep_the_names_of_their_files(name: str, tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#812, sgl-project/sglang#38618: packed in memory, others on disk: written back unmerged."""
    found = road(
        architectures.build(name, tmp_path / "b"), tmp_path, *LORA, f"{EXPERTS.replace('q_proj,', '')}"
    )
    names = {name for name in values(found.base) if "expert" in name or "block_sparse_moe" in name}
    names = {name for name in names if not any(part in name for part in (".gate.", "router", "shared"))}
    assert names and names == found.changed()
    found.plain()


def test_experts_without_a_gate_are_adapted_by_their_names(tmp_path: Path) -> None:
    """NVIDIA-NeMo/Automodel#1755: a list of gated names left the up_proj of ungated experts out, silently."""
    base = architectures.build("nemotron_h", tmp_path / "b")
    found = road(base, tmp_path / "o", *LORA, "lora.target_modules=up_proj,down_proj", steps=4)
    assert found.changed() == {name for name in values(base) if ".up_proj." in name or ".down_proj." in name}
    found.plain()
    with pytest.raises(ValueError, match=r"expected all-linear or some of .*up_proj.*, got gate_up_proj"):
        road(base, tmp_path / "p", *LORA, "lora.target_modules=gate_up_proj")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])  # Linear, Conv1D, Linear with a bias
@pytest.mark.parametrize("rslora", ["true", "false"])
def test_dora_is_merged_as_peft_does(name: str, rslora: str, tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#828, axolotl-ai-cloud/axolotl#3599: DoRA merged without its magnitude."""
    flags = ("lora.dora=true", f"lora.rslora={rslora}", "export=both")
    found = road(architectures.build(name, tmp_path / "b"), tmp_path, *LORA, *flags)
    plain, merged = found.plain().state_dict(), found.with_peft().merge_and_unload().state_dict()
    for key, value in merged.items():
        torch.testing.assert_close(plain[key], value, rtol=1e-5, atol=1e-6)
    told = read(found.adapter / "adapter_config.json")
    assert (told["use_dora"], told["use_rslora"]) == (True, rslora == "true")


def test_rslora_is_a_scale_of_the_root_of_the_rank(tmp_path: Path) -> None:
    """huggingface/peft#3449, NVIDIA/TensorRT-LLM#1668: the flag was lost, and the change off by sqrt(rank)."""
    base, flags = small("llama", tmp_path / "b"), ("train.tuning=lora", "lora.rank=4")
    one = road(base, tmp_path / "1", *flags, "lora.alpha=6", "lora.rslora=true")
    two = road(base, tmp_path / "2", *flags, "lora.alpha=12")
    first, second = values(one.model), values(two.model)
    assert one.changed() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("names", ["lm_head", "norm"])
def test_modules_trained_whole_are_read_by_every_loader(names: str, tmp_path: Path) -> None:
    """huggingface/transformers#48595, sentence-transformers#3980: in the file, but loaded as base or random values."""
    from peft import AutoPeftModelForCausalLM

    found = road(
        small("llama", tmp_path / "b"), tmp_path, *LORA, f"lora.modules_to_save={names}", "export=adapter"
    )
    found.with_peft()
    mended = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)  # transformers' own loader
    for loader in (AutoPeftModelForCausalLM, *([AutoModelForCausalLM] if mended else [])):
        torch.testing.assert_close(
            logits(loader.from_pretrained(found.adapter)), logits(found.live.base), rtol=1e-5, atol=1e-5
        )


def test_model_and_adapter_do_not_meet_in_one_folder(tmp_path: Path) -> None:
    """huggingface/peft#1381, Soup#351, nanoGPT#325: an adapter attached twice; names of wrappers in the files."""
    found = road(
        small("llama", tmp_path / "b"),
        tmp_path,
        *LORA,
        "lora.modules_to_save=norm",
        "export=both",
        "lora.layers=1:2",
    )
    files = {folder.name: {path.name for path in folder.iterdir()} for folder in (found.model, found.adapter)}
    assert (
        not [name for name in files["model"] if "adapter" in name]
        and "model.safetensors" not in files["adapter"]
    )
    wrapped = (
        "_orig_mod",
        "module.",
        "base_layer",
        "modules_to_save",
        "original_module",
        "base_model",
        "lora_",
    )
    adapter = values(found.adapter)
    assert not [name for name in values(found.model) if any(part in name for part in wrapped)]
    assert not [name for name in adapter if any(part in name for part in wrapped[:-2])]
    assert all(float(value.abs().max()) > 0 for value in adapter.values())
    linear = {name for name in values(found.base) if ".layers.1." in name and "norm" not in name}
    assert found.changed() - linear == {
        name for name in values(found.base) if name.endswith("norm.weight") and "layernorm" not in name
    }
    assert linear <= found.changed()  # PrimeIntellect-ai/prime-rl#1707: none, the plain base model


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_a_weight_read_past_its_layer_gets_no_adapter(name: str, tmp_path: Path) -> None:
    """huggingface/transformers#30316, peft#3554: adapters on dt_proj trained nothing, or merged to another model."""
    base = architectures.build(name, tmp_path / "b")
    with pytest.raises(ValueError, match="got dt_proj, whose weight the model reads past the layer"):
        road(base, tmp_path, *LORA, "lora.target_modules=dt_proj")
    found = road(base, tmp_path, *LORA)
    found.plain()
    assert found.changed() and not [n for n in found.changed() if "dt_proj" in n]


# --- settings and what lies beside the weights ---


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("run", ["float32", "bfloat16"])
def test_every_part_of_the_configuration_names_the_dtype_of_the_weights(
    stored: str, run: str, tmp_path: Path
) -> None:
    """axolotl-ai-cloud/axolotl#904, LlamaFactory#7401, transformers#33780: other types in the files than announced."""
    base = architectures.build("gemma3", tmp_path / "b")
    AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, stored)).save_pretrained(base)
    found = road(base, tmp_path, f"model.dtype={run}", steps=0)
    told = read(found.model / "config.json")
    assert {told["dtype"], told["text_config"]["dtype"], told["vision_config"]["dtype"]} == {run}
    assert {value.dtype for value in values(found.model).values()} == {getattr(torch, run)}


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("flags", [(), LORA], ids=["full", "lora"])
def test_no_trace_of_a_quantisation_stays(
    kind: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """allenai/open-instruct#149, mlx-lm#1172, peft#2321: said to be quantised, or quantised again when written."""
    base = tmp_path / "b"
    numbers = fp8_model(base) if kind == "fp8" else mxfp4_model(base, monkeypatch)
    found = road(base, tmp_path, *flags)
    assert "quantization_config" not in (found.model / "config.json").read_text()
    assert {value.dtype for value in values(found.model).values()} == {torch.float32}
    assert values(found.model).keys() == {name.removeprefix("base.") for name in numbers}
    found.plain()


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_bits_are_exported_in_plain_numbers(bits: int, tmp_path: Path) -> None:
    """huggingface/peft#2321: merged into a model of bits, whose files were quantised anew."""
    bits_model(tmp_path / "b", bits)
    found = road(tmp_path / "b", tmp_path, *LORA)
    assert "quantization_config" not in (found.model / "config.json").read_text()
    assert {value.dtype for value in values(found.model).values()} == {torch.float32}
    AutoModelForCausalLM.from_pretrained(found.model)


@pytest.mark.parametrize("flags", [(), LORA], ids=["full", "lora"])
def test_settings_of_a_router_are_kept(flags: tuple[str, ...], tmp_path: Path) -> None:
    """modelscope/ms-swift#5375, transformers#48690: the auxiliary loss counted otherwise, or switched off for ever."""
    found = road(architectures.build("mixtral_router_loss", tmp_path / "b"), tmp_path, *flags, lr=0.01)
    before, after = (read(folder / "config.json") for folder in (found.base, found.model))
    names = [name for name in before if "router" in name]
    assert before["output_router_logits"] and {n: before[n] for n in names} == {n: after[n] for n in names}
    assert found.live.extra.aux_weight == before["router_aux_loss_coef"]
    found.plain()


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "glm4_moe", "deepseek_v3"])
def test_layers_that_predict_several_tokens_are_said_to_be_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """modelscope/ms-swift#7848, unslothai/unsloth#11042: their tensors were missing afterwards, without a word."""
    from safetensors.torch import save_file

    base = architectures.build(name, tmp_path / "b")
    extra = "model.layers.2.eh_proj.weight" if name in ("glm4_moe", "deepseek_v3") else "mtp.fc.weight"
    own = values(base)
    save_file({**own, extra: torch.ones(16, 32)}, base / "model.safetensors", metadata={"format": "pt"})
    found = road(base, tmp_path, lr=0.01)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not part of" in line]
    assert line.endswith(f"not trained, not exported: {extra}") and values(found.model).keys() == own.keys()


@pytest.mark.parametrize("name", ["gpt2", "gpt-sw3"])
def test_weights_that_are_read_are_not_said_to_be_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found beside the reports: attn.bias of GPT-2, passed over on loading, is the end of c_attn.bias as well."""
    load_model(ModelConfig(name=str(architectures.build(name, tmp_path)), dtype="float32"))
    assert "not part of" not in capsys.readouterr().out
