"""What a causal language model does around its linear head, measured on a few random tokens.

A model may scale or cap its head's logits, and add an auxiliary loss or a z-loss, under names of its own. None is
looked up: chosen numbers are put in the place of the head's output and what becomes of them is fitted. Numbers of the
configuration only sharpen a fit that agrees with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE_TOKENS = 12  # per sequence; two sequences are read
_SMALL, _LARGE = 1e-2, 1e5  # outputs of the head this small show its scale, this large its cap


@dataclass(frozen=True)
class Surroundings:
    """What a model does around its head: ``logits = cap tanh(s x / cap)`` of the head's output x, ``s`` the scale.

    ``blocks`` names the list of transformer blocks inside the causal LM, None where no list of modules was run whole.
    """

    head: str  # the head's name inside the causal LM
    softcap: float | None = None
    logit_scale: float = 1.0
    blocks: str | None = None
    names: tuple[str, ...] = field(default=(), repr=False)  # of the modules that ran, in order


def probe_ids(rows: int, device: torch.device) -> Tensor:
    """Random tokens [2, PROBE_TOKENS] below ``rows``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rows, (2, PROBE_TOKENS), generator=generator).to(device)


def run(causal_lm: Any, input_ids: Tensor, **options: Any) -> Any:
    """The model's own output for whole sequences. Raises ``ValueError`` naming the class where it fails."""
    mask = torch.ones_like(input_ids)
    try:
        return causal_lm(input_ids=input_ids, attention_mask=mask, use_cache=False, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, IndexError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"model: expected {type(causal_lm).__name__} to read {input_ids.shape[1]} tokens on "
            f"{input_ids.device}, got {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


@torch.no_grad()
def measure(causal_lm: Any) -> Surroundings:
    """Head, scale, cap and blocks of a causal LM in eval mode that still has its own head.

    Raises ``ValueError`` for a model without a linear head, one that fails on a CPU or GPU as it is, one that does
    something else than scale and cap to its logits, and one whose logits depend on later tokens.
    """
    head = output_embedding(causal_lm)
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
        for name, module in causal_lm.named_modules()
    ]
    linear = causal_lm.get_submodule(head)
    ids = probe_ids(linear.weight.shape[0], linear.weight.device)
    try:
        logits = run(causal_lm, ids).logits
    finally:
        for handle in handles:
            handle.remove()
    name = type(causal_lm).__name__
    if ran.count(head) != 1:
        raise ValueError(
            f"model: expected {name} to call its output embedding {head} once, got {ran.count(head)} times"
        )
    _check_causal(causal_lm, ids, logits, rounding(logits, linear.weight))
    softcap, scale = _fit(causal_lm, linear, ids)
    return Surroundings(head, softcap, scale, _blocks(causal_lm, set(ran)), tuple(ran))


def output_embedding(causal_lm: Any) -> str:
    """The name of the linear output embedding inside ``causal_lm``; ``ValueError`` where it has none.

    Of a head that peft trains whole (``modules_to_save``) it is the copy that trains.
    """
    linear = causal_lm.get_output_embeddings()
    if hasattr(linear, "modules_to_save") and hasattr(linear, "original_module"):
        linear = linear.modules_to_save[linear.active_adapter]
    name = type(causal_lm).__name__
    if hasattr(linear, "base_layer"):
        raise ValueError(
            f"model: expected {name} to have a head without adapters before ours is there, got some"
        )
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"model: expected {name} to have a linear output embedding, got {type(linear).__name__}"
        )
    return next(name for name, module in causal_lm.named_modules() if module is linear)


def rounding(logits: Tensor, weight: Tensor) -> float:
    """The relative rounding of a model's logits: many are widened to float32 after a 16-bit head's product."""
    return max(torch.finfo(logits.dtype).eps, torch.finfo(weight.dtype).eps)


def _check_causal(causal_lm: Any, ids: Tensor, logits: Tensor, eps: float) -> None:
    """Another last token must leave the logits before it: a model that looks ahead would be given the answers."""
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % int(logits.shape[-1])
    ours, theirs = (x[:, :-1].float() for x in (logits, run(causal_lm, other).logits))
    moved = float((ours - theirs).abs().max())
    if not moved <= 8 * eps * max(1.0, float(ours.abs().max())):
        raise ValueError(
            f"model: expected {type(causal_lm).__name__} to be causal, got logits that move by {moved:.3g} when a "
            "later token changes (a model that was trained to fill in masked words?)"
        )


def _blocks(causal_lm: nn.Module, ran: set[str]) -> str | None:
    """The outermost list of modules that were all run, with the most parameters: the transformer's blocks."""
    lists = {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len(module)
        and all(f"{name}.{child}" in ran for child, _ in module.named_children())
    }
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outermost.items()}
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _fit(causal_lm: Any, linear: nn.Linear, ids: Tensor) -> tuple[float | None, float]:
    """(softcap, scale) with which the model turns what its head puts out into its logits."""
    shape = (*ids.shape, linear.out_features)
    count = math.prod(shape)
    x = 10.0 ** torch.linspace(-3, 6, count, device=ids.device)
    x *= torch.where(torch.arange(count, device=ids.device) % 2 == 0, 1.0, -1.0)
    generator = torch.Generator().manual_seed(1)
    x = x[torch.randperm(count, generator=generator).to(ids.device)].view(shape)
    handle = linear.register_forward_hook(lambda module, args, output: x.clone())
    try:
        logits = run(causal_lm, ids).logits
    finally:
        handle.remove()
    name = type(causal_lm).__name__
    if logits.shape != x.shape:
        raise ValueError(
            f"model: expected {name} to give {shape[-1]} logits a token, as many as its head has rows, "
            f"got {tuple(logits.shape)}"
        )
    y = logits.float()
    if torch.equal(y, x):
        return None, 1.0
    ratio = (y / x)[x.abs() < _SMALL]
    scale = float(ratio.median())
    largest = y[x.abs() > _LARGE].abs()
    capped = float(largest.max()) < 0.5 * abs(scale) * _LARGE
    error = max(1e-5, 4 * float((ratio - scale).abs().median() / max(abs(scale), 1e-30)))
    scale = _sharpened(scale, causal_lm.config, error)
    softcap = _sharpened(float(largest.median()), causal_lm.config, error) if capped else None
    expected = scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)
    off = (y - expected).abs() > 2 * error * expected.abs() + 1e-6
    if bool(off.any()) or not math.isfinite(scale) or scale == 0:
        place = int(off.flatten(0, 1).any(0).nonzero()[0]) if bool(off.any()) else 0
        raise ValueError(
            f"model: {name} is not supported: what it does to its head's logits is neither a scale nor a cap (fitted "
            f"scale {scale:g}, cap {softcap}; first seen at token {place})"
        )
    return softcap, scale


def _sharpened(value: float, config: Any, error: float) -> float:
    """``value``, or the number of the configuration, or its inverse, that it is within its relative ``error``."""
    known = [1.0, *numbers(config)]
    known += [1.0 / number for number in known if number]
    close = [number for number in known if abs(number - value) <= error * abs(value)]
    return min(close, key=lambda number: abs(number - value), default=value)


def numbers(config: Any) -> list[float]:
    """The numbers in a configuration and in the text model's inside it."""
    parts = [config, config.get_text_config() if hasattr(config, "get_text_config") else config]
    values = [value for part in parts for value in vars(part).values()]
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


@dataclass(frozen=True)
class Extra:
    """What a model adds to next-token loss: ``aux_weight`` times its ``aux_loss``, ``z_loss`` times mean lse²."""

    aux_weight: float = 0.0
    z_loss: float = 0.0


@torch.no_grad()
def measure_extra(causal_lm: Any, head_weight: Tensor) -> Extra:
    """The auxiliary loss and z-loss that a model with the head ``head_weight`` [V, D] adds where it is given labels.

    Raises ``ValueError`` for anything else that it adds.
    """
    ids = probe_ids(head_weight.shape[0], head_weight.device)
    output = run(causal_lm, ids, labels=ids)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    extra = float(output.loss) - own_loss(output, ids)
    aux = getattr(output, "aux_loss", None)
    tolerance = 1e-4 + 4 * rounding(output.logits, head_weight) * float(logits.abs().max())
    if aux is not None and float(aux) != 0:
        weight = extra / float(aux)
        error = tolerance / abs(float(aux))
        close = [v for v in numbers(causal_lm.config) if abs(v - weight) <= error]
        return Extra(aux_weight=min(close, key=lambda v: abs(v - weight), default=weight))
    if abs(extra) <= tolerance:
        return Extra()
    squared = mean_square(output.logits)
    weight = extra / squared
    close = [v for v in numbers(causal_lm.config) if v and abs(v - weight) <= tolerance / squared]
    if not close:
        raise ValueError(
            f"model: {type(causal_lm).__name__} is not supported: it adds {extra:.3g} to next-token loss, which is "
            "neither an auxiliary loss that it returns nor a z-loss that its configuration names"
        )
    return Extra(z_loss=min(close, key=lambda v: abs(v - weight)))


def own_loss(output: Any, ids: Tensor) -> float:
    """Cross-entropy of a model's logits for ``ids`` [B, T] as labels: next tokens, or as they stand.

    The decoders of encoder-decoder models compare logits with the labels at the same place: their callers shift. Which
    of the two it is shows in the model's own loss.
    """
    logits = output.logits.float()
    shifted = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    as_given = float(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    found, allowed = float(output.loss), 1e-3 * abs(as_given)
    if getattr(output, "aux_loss", None) is None:  # these decoders also take their loss of rounded logits
        allowed += 4 * torch.finfo(output.logits.dtype).eps * float(logits.abs().max())
    close = abs(found - as_given) <= min(allowed, abs(found - shifted))
    return as_given if close else shifted


def mean_square(logits: Tensor) -> float:
    """Mean of lse squared over all positions of ``logits`` [B, T, V], the last ones too, as a model's z-loss is."""
    return float(logits.float().logsumexp(-1).square().mean())


@contextmanager
def enlarged(head: nn.Module, gain: float) -> Iterator[None]:
    """Multiply what goes into the head by ``gain`` inside the block."""
    handle = head.register_forward_pre_hook(lambda module, args: (args[0] * gain, *args[1:]))
    try:
        yield
    finally:
        handle.remove()
