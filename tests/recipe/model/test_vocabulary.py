"""Added tokens get ids and rows, the same everywhere; ids without a row are refused; padding is always a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.config import Config
from sftmix.model.export import merge_and_export
from sftmix.model.load import load_model
from sftmix.model.tokenizer import load_tokenizer
from sftmix.model.vocabulary import added_tokens, check_added_tokens, check_ids, safe_pad_id
from tests.recipe import tiny

NEW = "model.added_tokens=<|think|>, <|im_end|>,<|tool|>"  # the middle one is known already


def saved(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    tiny.causal_lm(kind, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def config(folder: Path, *flags: str) -> Config:
    return tiny.config(f"model.name={folder}", *flags)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("vocabulary:")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi"])  # own head, tied head, head with a bias
def test_embedding_and_head_grow_by_the_added_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dtype: str
) -> None:
    before, _ = load_model(config(saved(tmp_path, kind), f"model.dtype={dtype}").model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    capsys.readouterr()
    model, tokenizer = load_model(config(tmp_path, f"model.dtype={dtype}", NEW).model)
    assert torch.equal(torch.get_rng_state(), state)
    assert said(capsys) == ["vocabulary: 2 tokens added, embedding 61 -> 63 rows"]
    assert tokenizer.convert_tokens_to_ids(["<|think|>", "<|tool|>", "<|im_end|>"]) == [61, 62, 2]
    assert tokenizer.tokenize("w1 <|think|>w2") == ["w1", "<|think|>", "w2"]
    assert tokenizer.decode([7, 61], skip_special_tokens=True) == "w0"
    assert model.vocab_size == model.base.config.vocab_size == 63 and model.is_tied == before.is_tied
    for name in ("embedding", "head"):
        new, old = (
            (one.base.get_input_embeddings() if name == "embedding" else one.head).weight.detach()
            for one in (model, before)
        )
        assert new.dtype == getattr(torch, dtype) and new.shape == (63, 16)
        assert torch.equal(new[:61], old)
        torch.testing.assert_close(new[61:].float(), old.float().mean(0).expand(2, -1), rtol=1e-2, atol=1e-3)
    torch.manual_seed(77)  # whatever a process drew before
    again, _ = load_model(config(tmp_path, f"model.dtype={dtype}", NEW).model)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_grown_model_is_exported_whole_and_grows_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (NEW, "model.dtype=float32")
    model, tokenizer = load_model(config(saved(tmp_path / "base"), *flags).model)
    merge_and_export(model, tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.vocab_size == 63 and torch.equal(plain.lm_head.weight, model.head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|tool|>") == 62
    said(capsys)
    again, _ = load_model(config(tmp_path / "out", *flags).model)
    assert again.vocab_size == 63 and said(capsys) == []


def test_rows_that_are_there_already_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_model(config(saved(tmp_path, vocab_size=64), NEW).model)
    assert model.vocab_size == 64
    assert said(capsys) == ["vocabulary: 2 tokens added, in rows that the embedding of 64 already has"]


def test_without_the_knob_nothing_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    saved(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, found = load_model(config(tmp_path).model)
    assert model.vocab_size == 61 and len(found) == 62 and said(capsys) == []
    check_ids(found, model.vocab_size, [0, 60])
    with pytest.raises(ValueError) as caught:
        check_ids(found, model.vocab_size, [5, 61, 61])
    assert str(caught.value) == (
        "data: expected tokens that the model's embedding of 61 rows holds, got <|extra|>: "
        "--model.added_tokens '<|extra|>' adds rows for them"
    )
    grown, found = load_model(config(tmp_path, "model.added_tokens=<|extra|>").model)
    assert grown.vocab_size == 62 and said(capsys) == ["vocabulary: 0 tokens added, embedding 61 -> 62 rows"]
    check_ids(found, grown.vocab_size, [61])


@pytest.mark.parametrize("value", ["a,,b", "a,b,a", ",", ""])
def test_a_list_of_tokens_that_makes_no_sense_is_refused(value: str) -> None:
    found = dataclasses.replace(tiny.config().model, added_tokens=value)
    with pytest.raises(
        ValueError, match=r"^model\.added_tokens: expected different tokens, separated by commas"
    ):
        added_tokens(found)


def test_the_tokenizer_alone_has_them_too(tmp_path: Path) -> None:
    assert load_tokenizer(config(saved(tmp_path), NEW).model).convert_tokens_to_ids("<|tool|>") == 62


@pytest.mark.parametrize(
    "pad,eos,expected", [(None, "<|im_end|>", 2), ("<|far|>", "<|im_end|>", 2), ("<pad>", None, 0)]
)
def test_padding_is_always_a_row(pad: str | None, eos: str | None, expected: int) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    if pad == "<|far|>":
        tokenizer.add_tokens(["<|far|>"], special_tokens=True)
        assert tokenizer.pad_token_id == 61
    assert safe_pad_id(tokenizer, 61) == expected
    tokenizer.pad_token = tokenizer.eos_token = None
    assert safe_pad_id(tokenizer, 61) == 0


@pytest.mark.parametrize("kind,needed", [("llama", "embed_tokens,lm_head"), ("qwen3", "embed_tokens")])
def test_added_tokens_that_adapters_would_not_train_are_refused(
    tmp_path: Path, kind: str, needed: str
) -> None:
    flags = [NEW, "train.tuning=lora"]
    found = config(saved(tmp_path, kind), *flags)
    model, _ = load_model(found.model)
    with pytest.raises(ValueError, match=f"modules_to_save: expected {needed} with .*, got None"):
        check_added_tokens(model, found)
    if "," in needed:
        with pytest.raises(ValueError, match=f"expected {needed} with .*, got embed_tokens"):
            check_added_tokens(model, config(tmp_path, *flags, "lora.modules_to_save=embed_tokens"))
    check_added_tokens(model, config(tmp_path, *flags, f"lora.modules_to_save={needed}"))
    check_added_tokens(model, config(tmp_path, NEW))
    check_added_tokens(model, config(tmp_path, "train.tuning=lora"))
