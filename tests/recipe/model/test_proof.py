"""An export that is not what was trained fails, whatever is wrong with it, and what stood there before stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sftmix.config import LoraConfig, ModelConfig
from sftmix.model import export as export_module
from sftmix.model import proof
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.export import export_adapter, merge_and_export
from sftmix.model.lora import apply_lora
from tests.recipe import tiny

IDS = [(5, 8, 9, 30, 2), (11, 12, 40)]
Spoil = Callable[[dict[str, Tensor]], Any]


def lora(kind: str = "llama", dtype: torch.dtype = torch.float32, *, size: float = 0.2) -> SFTMixModel:
    model = apply_lora(tiny.model(kind, dtype=dtype), LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=size)
    return model


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    """Let the export take a state that is not the model's."""
    merged = export_module.merged_state

    def wrong(model: SFTMixModel) -> dict[str, Tensor]:
        state = merged(model)
        spoil(state)
        return state

    monkeypatch.setattr(export_module, "merged_state", wrong)


def scale(state: dict[str, Tensor], name: str, factor: float) -> None:
    state[name] = state[name] * factor


WRONG: dict[str, Spoil] = {
    "one tensor a little off": lambda state: scale(state, "model.layers.0.mlp.down_proj.weight", 1.02),
    "a norm off": lambda state: scale(state, "model.norm.weight", 1.01),
    "two layers swapped": lambda state: state.update(
        {
            "model.layers.0.mlp.up_proj.weight": state["model.layers.1.mlp.up_proj.weight"],
            "model.layers.1.mlp.up_proj.weight": state["model.layers.0.mlp.up_proj.weight"],
        }
    ),
    "a transposed square": lambda state: state.update(
        {"model.layers.0.self_attn.q_proj.weight": state["model.layers.0.self_attn.q_proj.weight"].T.contiguous()}
    ),
    "the head of another model": lambda state: scale(state, "lm_head.weight", -1.0),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("make", [tiny.model, lora], ids=["full", "lora"])
def test_wrong_weights_are_found_by_their_logits(
    what: str, make: Callable[[], SFTMixModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").write_text("stays")
    spoiled(monkeypatch, WRONG[what])
    with pytest.raises(ValueError, match="export: expected the files to give the trained model's logits"):
        merge_and_export(make(), tiny.tokenizer(), tmp_path / "out", texts=IDS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["before"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("size", [0.2, 1e-3])
def test_an_export_without_the_adapters_is_found_however_little_they_do(
    size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of the past: adapters trained, and the exported model was the base model, bit for bit."""
    base = tiny.causal_lm("llama").state_dict()
    spoiled(monkeypatch, lambda state: state.update(base))
    with pytest.raises(ValueError, match="export: expected the files to give the trained model's logits"):
        merge_and_export(lora(size=size), tiny.tokenizer(), tmp_path / "out", texts=IDS)


def test_a_change_that_rounding_takes_away_fails_with_the_way_out() -> None:
    """A change of the logits that the merged weights, rounded to bfloat16, have none of."""
    base = proof.trained_logits(tiny.model("llama", dtype=torch.bfloat16), IDS)
    moved = tuple(logits + 0.2 * logits.std() for logits in base.trained)
    with pytest.raises(
        ValueError, match=r"100% of what the adapters change is lost .*--export adapter keeps it"
    ):
        proof.check_logits(tiny.causal_lm("llama").bfloat16(), proof.Logits(base.ids, moved, base.trained))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral", "ernie4_5_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_right_exports_pass(kind: str, dtype: torch.dtype, adapted: bool, tmp_path: Path) -> None:
    model = lora(kind, dtype) if adapted else tiny.model(kind, dtype=dtype)
    plain = merge_and_export(model, tiny.tokenizer(), tmp_path / "out", texts=IDS)
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        ours, theirs = model.logits(ids), plain(ids).logits
    assert torch.equal(ours, theirs) or adapted
    assert plain.get_output_embeddings().weight.dtype == dtype


def test_what_the_files_hold_is_compared_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written wrong: a tensor dropped, renamed, rounded or cut by whoever saves."""
    model = tiny.model("llama")
    changes: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (lambda s: s.pop("model.layers.1.mlp.down_proj.weight"), "expected model.layers.1.mlp.down_proj.weight in"),
        (lambda s: scale(s, "model.norm.weight", 1.001), "expected model.norm.weight in the files as it was"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1e-4}), "expected lm_head.weight in the files"),
    ]  # fmt: skip
    read = proof.reload

    for change, message in changes:

        def reload(folder: Path, change: Any = change, **options: Any) -> Any:
            state = load_file(folder / "model.safetensors")
            change(state)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            return read(folder, **options)

        monkeypatch.setattr(proof, "reload", reload)
        with pytest.raises(ValueError, match=f"export: {message}"):
            merge_and_export(model, tiny.tokenizer(), tmp_path / "out", texts=IDS)
        assert not list(tmp_path.iterdir())


def test_plain_transformers_loads_it_offline_without_our_package(tmp_path: Path) -> None:
    """In a process that cannot import us: the logits are the trained model's."""
    model = lora()
    merge_and_export(model, tiny.tokenizer(), tmp_path / "out", texts=IDS)
    program = (
        "import json, sys\n"
        "sys.modules.update(sftmix=None, sftmix_kernels=None)\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)\n"
        f"print(json.dumps(model(torch.tensor([{list(IDS[0])}])).logits[0].tolist()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = model.logits(torch.tensor([IDS[0]]))[0]
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_large_weights_are_sharded_with_an_index(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export_module.MAX_SHARD == "5GB"
    monkeypatch.setattr(export_module, "MAX_SHARD", "8KB")
    model = tiny.model(kind)
    merge_and_export(model, tiny.tokenizer(), tmp_path / "out", texts=IDS)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(plain(torch.tensor([IDS[0]])).logits, model.logits(torch.tensor([IDS[0]])))


def test_an_adapter_is_read_back_with_peft_and_a_wrong_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tiny.causal_lm("llama").save_pretrained(base)
    model = lora()
    export_adapter(model, tiny.tokenizer(), tmp_path / "good", base=ModelConfig(name=str(base)), texts=IDS)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "good").iterdir()
    }
    written = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base.resolve())
    other = tiny.causal_lm("llama", seed=1)
    other.save_pretrained(base)  # the adapter is put on another model than it was trained on
    with pytest.raises(ValueError, match="export: expected the files to give the trained model's logits"):
        export_adapter(model, tiny.tokenizer(), tmp_path / "bad", base=ModelConfig(name=str(base)), texts=IDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "good"]


def test_random_tokens_stand_in_where_there_are_no_texts() -> None:
    texts = proof.texts_of([], tiny.VOCAB)
    assert len(texts) == 2 and all(0 <= token < tiny.VOCAB for text in texts for token in text)
    assert proof.texts_of([range(1000)], 5000) == (tuple(range(proof.LONGEST)),)
