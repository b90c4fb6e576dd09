"""Packed rows: nothing crosses, measured; a model that lets it cross is refused, and its attention is as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sftmix.model import packing
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.documents import BY_DOCUMENT, attend_as_before, attend_by_document, documents
from sftmix.model.packing import BLOCK_MASK, BY_DOCUMENTS, VARLEN, measure_packing, packs
from tests.recipe import tiny
from tests.recipe.model.architectures import ROWS, causal_lm

# Dense, learned positions, eager with a cap and windows, windows, chunks, sinks, experts, a scale, shifted positions.
PACKED = "llama gpt2 gemma2 qwen3 mistral llama4_text gpt_oss mixtral cohere opt".split()
CROSSED = {
    "5.17": ("llama4_text", "opt")
}  # by transformers itself: chunks over the row, a mask without documents
MASKED = ["gpt_neox_japanese"]  # it calculates with the mask that it is given
REFUSED = {
    "mamba": "change by", "lfm2_conv": "change by", "qwen3_next": "change by", "recurrent_gemma": "change by",
    "bloom": "change by", "roberta": "change by", "openai-gpt": "change by", "deepseek_v4": "off what they are alone",
    "gpt_neo": "its own masks end at 64 tokens", "deepseek_v32": "padding alone changes|off what they are alone",
}  # fmt: skip
VERSION = ".".join(transformers.__version__.split(".")[:2])
LENGTHS = (11, 3, 17, 1, 9)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_measurements", {})


def built(name: str, **changes: Any) -> SFTMixModel:
    found = causal_lm(name)
    for key, value in changes.items():
        setattr(found.config, key, value)
    return install_head(found)


def tokens(*lengths: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCAB, (n,), generator=generator) for n in lengths]


def row_of(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """The row [1, T], its positions, and where its documents begin; not by the code under test."""
    starts = [sum(len(x) for x in ids[:i]) for i in range(len(ids) + 1)]
    return torch.cat(list(ids))[None], torch.cat([torch.arange(len(x)) for x in ids])[None], starts


def packed_logits(model: SFTMixModel, ids: Sequence[Tensor]) -> list[Tensor]:
    row, positions, starts = row_of(ids)
    found: Any = model(row, None, None, None, position_ids=positions, starts=starts)
    return [found[0, a:b] for a, b in pairwise(starts)]


def check_row(model: SFTMixModel, ids: list[Tensor], *, exact: bool) -> None:
    """Logits of a row are those of each document alone; another one's tokens and gradients are nothing to it."""
    rtol, atol = (0.0, 0.0) if exact else (1e-4, 1e-5)
    with torch.no_grad():
        found = packed_logits(model, ids)
        for ours, document in zip(found, ids, strict=True):
            torch.testing.assert_close(ours, model.logits(document[None])[0], rtol=1e-4, atol=1e-5)
        for changed in range(len(ids)):
            other = [(x + 1) % tiny.VOCAB if i == changed else x for i, x in enumerate(ids)]
            for i, (ours, before) in enumerate(zip(packed_logits(model, other), found, strict=True)):
                if i != changed:
                    torch.testing.assert_close(ours, before, rtol=rtol, atol=atol)
    embedded: list[Tensor] = []
    handle = model.base.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output.detach().requires_grad_()) or embedded[-1].clone()
    )
    try:
        found, starts = packed_logits(model, ids), row_of(ids)[2]
    finally:
        handle.remove()
    for i, ours in enumerate(found):
        (gradient,) = torch.autograd.grad(ours.square().sum(), embedded[0], retain_graph=True)
        reached = gradient[0].abs().sum(-1) > (0 if exact else 1e-6)
        assert not reached[: starts[i]].any() and not reached[starts[i + 1] :].any()
        assert reached[starts[i] : starts[i + 1]].all()


@pytest.mark.parametrize("name", PACKED)
def test_a_row_is_read_a_document_at_a_time(name: str) -> None:
    model = built(name)
    if name in CROSSED.get(VERSION, ()):
        assert not packs(model, "auto")
        return
    assert packs(model, "auto") and model.packing is not None and model.packing.way == BY_DOCUMENTS
    check_row(model, tokens(*LENGTHS), exact=name in ("llama", "gpt2", "gemma2", "qwen3", "mistral", "opt"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_a_document_in_a_row_is_bit_for_bit_what_it_is_alone(name: str) -> None:
    model, ids = built(name), tokens(*(12, 20, 16))
    assert packs(model, "auto")
    with torch.no_grad():
        for ours, document in zip(packed_logits(model, ids), ids, strict=True):
            torch.testing.assert_close(ours, model.logits(document[None])[0], rtol=0, atol=2e-6)


def test_documents_longer_than_the_models_positions_together() -> None:
    for name in ("gpt2", "llama"):  # 64 each
        model = built(name)
        assert packs(model, "auto")
        check_row(model, tokens(50, 40, 30), exact=True)


@pytest.mark.parametrize("name", MASKED)
def test_a_model_that_wants_a_mask_packs_when_told_to(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = built(name)
    assert not packs(model, "auto")
    assert "packing: off for" in (said := capsys.readouterr().out) and BLOCK_MASK in said
    assert not packs(model, "auto") and not capsys.readouterr().out  # said once
    assert packs(model, "on") and model.base.config._attn_implementation in BY_DOCUMENT  # its own
    check_row(model, tokens(*LENGTHS), exact=False)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_lets_documents_cross_is_refused(name: str) -> None:
    model = built(name)
    if (
        name == "deepseek_v4"
    ):  # documents of its 64 positions fill no block of the 128 tokens that it compresses
        model.base.config.max_position_embeddings = 512
    before = {id(m): m.config._attn_implementation for m in model.base.modules() if hasattr(m, "config")}
    kind = type(model.base).__name__
    with pytest.raises(
        ValueError, match=f"^train.packing: expected off or auto with {kind}.*{REFUSED[name]}.*got on$"
    ):
        packs(model, "on")
    assert not packs(model, "auto") and not packs(model, "off")
    after = {id(m): m.config._attn_implementation for m in model.base.modules() if hasattr(m, "config")}
    assert after == before


@pytest.mark.parametrize("wrong", ["windows", "positions", "one mask"])
def test_the_probe_sees_what_crosses(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for: each of these models answers as if nothing were wrong."""
    model = built(
        "gpt2" if wrong == "positions" else "mistral"
    )  # turned positions are relative: these need none
    forward, config = type(model.base).forward, model.base.config

    def told(self: Any, **inputs: Any) -> Any:
        if inputs.get("position_ids") is not None:
            if wrong == "one mask":  # a model that overwrites the mask it makes
                inputs["attention_mask"] = torch.ones(
                    1, 1, *inputs["input_ids"].shape * 2, dtype=torch.bool
                ).tril()
            elif wrong == "positions":
                del inputs["position_ids"]
            else:  # documents apart, the window lost; the configuration's own is far longer than the probe's
                cut = (inputs["position_ids"] == 0).cumsum(-1)
                inputs["attention_mask"] = (cut[:, None, :, None] == cut[:, None, None, :]).tril()
        return forward(self, **inputs)

    if wrong == "windows":
        config.sliding_window = 4096
    monkeypatch.setattr(type(model.base), "forward", told)
    assert measure_packing(model).way is None
    assert wrong != "windows" or config.sliding_window == 4096


def test_without_a_row_the_attention_is_transformers() -> None:
    for name in ("llama", "gemma2"):
        model, ids = built(name), torch.stack(tokens(9, 9))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        expected = model.base(input_ids=ids, attention_mask=mask).logits
        written = model.base.generate(ids[:1], max_new_tokens=4, do_sample=False)
        attend_by_document(model.base)
        assert model.base.config._attn_implementation in BY_DOCUMENT.values()
        assert "by_document" not in str(model.base.config.to_dict())
        assert torch.equal(model.base(input_ids=ids, attention_mask=mask).logits, expected)
        assert torch.equal(model.base.generate(ids[:1], max_new_tokens=4, do_sample=False), written)
        attend_as_before(model.base)
        assert model.base.config._attn_implementation in BY_DOCUMENT


def test_another_model_of_the_kind_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packs(built("llama"), "auto")
    monkeypatch.setattr(packing, "measure_packing", lambda model: pytest.fail("measured again"))
    again = built("llama")
    assert packs(again, "auto")
    check_row(again, tokens(5, 4), exact=True)


def test_rows_end_with_the_block() -> None:
    model, ids = built("llama"), tokens(6, 7)
    assert packs(model, "auto")
    row, positions, starts = row_of(ids)
    with documents(starts):
        pass
    # told nothing of documents, transformers finds them in the positions: a mask over the row, the same result
    with torch.no_grad():
        masked = model.base(input_ids=row, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(torch.cat(packed_logits(model, ids)), masked, rtol=1e-4, atol=1e-5)


def test_a_model_that_goes_by_its_attentions_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of keys are chosen under sdpa's own name alone, and by their place in the row."""
    if VERSION == "5.17":
        pytest.skip("this transformers' configuration has no such layers")
    monkeypatch.setitem(ROWS, "minimax_m3", {
        "of": "minimax_m3_vl_text", "layer_types": ["minimax_m3_sparse"] * 2, "max_position_embeddings": 512,
    })  # fmt: skip
    model = built("minimax_m3")
    assert measure_packing(model).way is None and model.base.config._attn_implementation == "sdpa"


SEEN: list[dict[str, Any]] = []


def variable_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, **told: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What flash attention does with the lengths that it is told, in plain torch; it looks at nothing else."""
    SEEN.append(told)
    batch, repeats = query.shape[0], query.shape[1] // key.shape[1]
    if told.get("cu_seq_lens_q") is None:
        parts = [(b, 0, query.shape[2]) for b in range(batch)]
    else:
        cuts = told["cu_seq_lens_q"].tolist()
        assert told["cu_seq_lens_q"].dtype == torch.int32 and told["cu_seq_lens_k"].tolist() == cuts
        assert told["max_length_q"] == told["max_length_k"] == max(b - a for a, b in pairwise(cuts))
        assert isinstance(told["max_length_q"], int) and attention_mask is None
        parts = [(0, a, b) for a, b in pairwise(cuts)]
    found = torch.zeros(batch, query.shape[2], query.shape[1], value.shape[-1])
    for b, start, stop in parts:
        q = query[b, :, start:stop]
        k, v = (x[b, :, start:stop].repeat_interleave(repeats, 0) for x in (key, value))
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        if sliding_window is not None:
            seen = seen.triu(1 - sliding_window)
        if attention_mask is not None:
            seen = seen & attention_mask[b, None, start:stop].bool()
            seen = seen | torch.eye(stop - start, dtype=torch.bool)  # a padding row has something to see
        found[b, start:stop] = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling).transpose(
            0, 1
        )
    return found, None


@pytest.fixture
def flash() -> Iterator[str]:
    """The name of an attention of flash attention's interface; flash attention itself needs a GPU."""
    name = "flash_attention_stub"
    AttentionInterface.register(name, variable_lengths)
    AttentionMaskInterface.register(name, flash_attention_mask)
    SEEN.clear()
    yield name
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "mixtral"])
def test_flash_attention_is_told_the_lengths(name: str, flash: str) -> None:
    model = built(name)
    model.base.config._attn_implementation = flash
    assert packs(model, "auto") and model.packing is not None and model.packing.way == VARLEN
    assert model.base.config._attn_implementation == flash
    SEEN.clear()
    check_row(model, tokens(*LENGTHS), exact=name != "mixtral")
    assert any(told.get("cu_seq_lens_q") is not None for told in SEEN)


def test_flash_attention_that_is_not_told_is_refused(flash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    model.base.config._attn_implementation = flash
    monkeypatch.setattr(packing, "is_flash", lambda causal_lm: False)
    assert (found := measure_packing(model)).way is None and "change by" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name != "inkling_padded"])
def test_what_the_probe_takes_is_apart(name: str) -> None:
    """Of every architecture: a row of other lengths than the probe's is what its documents are alone."""
    model = built(name)
    found = measure_packing(model)
    if VERSION == "5.23":  # others are for the probe to find
        assert (found.way is None) == (name in NOT_PACKED), found
    if found.way is not None:
        check_row(model, tokens(*LENGTHS), exact=False)
        check_row(model, tokens(31, 40, 28, seed=5), exact=False)


NOT_PACKED = """
    axk2 bailing_hybrid bamba bart big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert
    data2vec-text deepseek_v32 dots3_note_text falcon falcon_alibi falcon_h1 falcon_mamba falcon_new
    glm_moe_dsa gpt_neo granitemoehybrid hy_v4 inkling2_text inkling_text jamba kimi_linear lfm2_conv lfm2_moe lfm3
    mamba mamba2 marian mbart megatron-bert minimax mpt mvp nemotron_h olmo_hybrid openai-gpt pegasus plbart
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer
    rembert roberta roberta-prelayernorm roformer rwkv trocr xglm xlm xlm-roberta xlm-roberta-xl xlstm xmod zamba
    zamba2 zaya
""".split()
