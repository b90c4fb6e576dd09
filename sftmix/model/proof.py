"""The proof that what was exported is what was trained: plain transformers reads the files, its logits are compared.

Files are read offline and without this package's classes. Every tensor must be there with the values that were
exported, and the logits on the given texts must be the trained model's: the same up to rounding where all weights were
trained, within the rounding of the merged weights under LoRA, and always nearer to the trained model than the base is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sftmix.model.documents import plain_attention
from sftmix.model.load import quiet, read_causal_lm
from sftmix.model.lora import is_lora
from sftmix.model.probe import probe_ids
from sftmix.model.quantised import exact_products, kind_of, quantisation
from sftmix.model.source import place, read_configuration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sftmix.config import ModelConfig
    from sftmix.model.causal_lm import SFTMixModel

LONGEST = 256  # tokens of a text that are compared


@dataclass(frozen=True)
class Logits:
    """The trained model's logits on some texts, float32 on the CPU, and the base model's where it has adapters."""

    ids: tuple[tuple[int, ...], ...]
    trained: tuple[Tensor, ...]  # [T, V] each
    base: tuple[Tensor, ...] = ()


def texts_of(texts: Sequence[Sequence[int]], rows: int) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the texts; random tokens where there are none."""
    cut = tuple(tuple(int(token) for token in text[:LONGEST]) for text in texts if len(text))
    return cut or tuple(tuple(row) for row in probe_ids(rows, torch.device("cpu")).tolist())


@torch.no_grad()
def trained_logits(model: SFTMixModel, texts: Sequence[Sequence[int]], *, exact: bool = False) -> Logits:
    """The logits of the model as it is, in eval mode; under FSDP every process calls it.

    ``exact``: without the rounding of activations in 8-bit products, which no merged model has.
    """
    ids = texts_of(texts, model.vocab_size)
    training = model.training
    model.eval()
    products = exact_products(model.base) if exact else nullcontext()
    try:
        with products:
            trained = tuple(_logits(model, text) for text in ids)
            base: tuple[Tensor, ...] = ()
            if is_lora(model):
                with _without_adapters(model):
                    base = tuple(_logits(model, text) for text in ids)
    finally:
        model.train(training)
    return Logits(ids, trained, base)


def _logits(model: SFTMixModel, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([ids], device=model.device)
    return model.logits(tokens)[0].float().cpu()


@contextmanager
def _without_adapters(model: SFTMixModel) -> Iterator[None]:
    with model.model.disable_adapter() if hasattr(model.model, "disable_adapter") else nullcontext():  # type: ignore[operator]
        yield


def reload(folder: Path, *, like: Any, trust_remote_code: bool = False) -> Any:
    """The exported model as plain transformers reads it, offline, in eval mode on the CPU."""
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code,
        attn_implementation=plain_attention(like.config),
    ).eval()  # fmt: skip


def reload_adapter(base: ModelConfig, folder: Path, *, like: SFTMixModel) -> Any:
    """The base model as transformers reads it with the adapter as peft puts it on, in eval mode on the CPU.

    A quantised base is read as it was for training: its numbers in the run's type, or its bits.
    """
    from peft import PeftModel

    with quiet():
        if kind_of(quantisation(read_configuration(base))) is not None:
            plain, _ = read_causal_lm(base, like.dtype, "cpu")
        else:
            plain = AutoModelForCausalLM.from_pretrained(
                place(base), revision=base.revision or "main", trust_remote_code=base.trust_remote_code,
                dtype=like.dtype, attn_implementation=plain_attention(like.base.config),
            )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is compared
        return PeftModel.from_pretrained(plain, str(folder)).eval()


def check_tensors(plain: Any, state: Mapping[str, Tensor]) -> None:
    """Every exported tensor must have come back, bit for bit. Raises ``ValueError`` naming the first that did not."""
    found = plain.state_dict()
    missing, unknown = sorted(state.keys() - found.keys()), sorted(found.keys() - state.keys())
    if missing or unknown:
        raise ValueError(
            f"export: expected the files to hold the trained model's {len(state)} tensors, got {len(missing)} of them "
            f"missing and {len(unknown)} unknown (first: {(missing + unknown)[0]})"
        )
    for name, tensor in state.items():
        other = found[name]
        if other.dtype != tensor.dtype or other.shape != tensor.shape or not torch.equal(other.cpu(), tensor):
            raise ValueError(
                f"export: expected {name} in the files as it was trained ({tensor.dtype}, {tuple(tensor.shape)}), got "
                f"other values ({other.dtype}, {tuple(other.shape)})"
            )


@torch.no_grad()
def check_logits(plain: Any, expected: Logits) -> float:
    """The largest difference of logits; ``ValueError`` where it is more than rounding explains."""
    eps = torch.finfo(next(p.dtype for p in plain.parameters() if p.is_floating_point())).eps
    worst = 0.0
    device = next(plain.parameters()).device
    for at, (ids, trained) in enumerate(zip(expected.ids, expected.trained, strict=True)):
        tokens = torch.tensor([ids], device=device)
        found = plain(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        logits = found.logits[0].float().cpu()
        if logits.shape != trained.shape:
            raise ValueError(f"export: expected logits {tuple(trained.shape)}, got {tuple(logits.shape)}")
        error, largest = (logits - trained).abs().max().item(), trained.abs().max().item()
        # The same weights give the same logits. Merged ones are rounded anew, which every layer passes on and random
        # weights amplify; there the second criterion tells.
        merged = 2e-4 if eps < 1e-6 else 0.25
        allowed = (merged if expected.base else 8 * eps) * max(1.0, largest)
        if not error <= allowed:
            raise ValueError(
                f"export: expected the files to give the trained model's logits, got others: they differ by "
                f"{error:.3g} (of {largest:.3g}) on text {at}; nothing was exported, the checkpoint stays"
            )
        if expected.base:
            # What the adapters do must be in the merged weights, however small it is beside the logits.
            effect, lost = _rms(expected.base[at] - trained), _rms(logits - trained)
            if effect > 4 * eps * _rms(trained) and lost > 0.5 * effect:
                raise ValueError(
                    f"export: expected the files to give the trained model's logits, got others: {lost / effect:.0%} "
                    f"of what the adapters change is lost on text {at}; nothing was exported, the checkpoint stays "
                    "(where 16-bit weights round the change away, --export adapter keeps it)"
                )
        worst = max(worst, error)
    return worst


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
