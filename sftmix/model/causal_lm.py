"""The language model as the recipe trains it: any causal LM, its head replaced by ``LossHead``.

``SFTMixModel.forward`` runs the decoder once, keeps the rows that bear loss, and lets the head turn
them into the loss, so that a sharded head is gathered by its own forward. What the head does beyond
``W h + b`` (softcap, logit scale) is guessed from the model's configuration and then checked:
``verify_head`` compares our loss with that of the model's own logits and refuses a model that disagrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix_kernels import LossHead, SFTMixLoss, TokenStats

PROBE_TOKENS = 12  # per sequence; two sequences are compared
PROBE_LOGIT = 100.0  # the head is also probed with logits this large, where no softcap can hide


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter ``dtype``, in place; buffers keep theirs (rotary frequencies need float32)."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


class SFTMixModel(nn.Module):
    """A causal LM whose forward is the SFTMix loss.

    ``model`` is the causal LM (or the peft model around it) with a ``LossHead`` as output embedding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dtype: torch.dtype = self.head.weight.dtype  # what the model computes in, sharded or not
        self.training = model.training  # a new module would say True over a model in eval mode

    @property
    def base(self) -> Any:
        """The causal LM itself, without a peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]

    @property
    def decoder(self) -> nn.Module:
        """The module whose ``last_hidden_state`` the head sees."""
        return cast(nn.Module, self.base.get_decoder())

    @property
    def head(self) -> LossHead:
        return cast(LossHead, self.base.get_output_embeddings())

    @property
    def is_tied(self) -> bool:
        """Whether head and input embedding are one parameter."""
        return self.head.weight is self.base.get_input_embeddings().weight

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: Tensor,  # [B, T] int64
        attention_mask: Tensor,  # [B, T] int64
        rows: Tensor,  # [N] int64, indices into the flattened [B * T] hidden states
        target: Tensor,  # [N] int64
        lam: Tensor | None = None,  # [M] float32
        *,
        stats: bool = False,
        **options: Any,
    ) -> SFTMixLoss | TokenStats:
        """The loss of the chosen rows, or with ``stats`` their ``TokenStats``; options of ``sftmix_loss``."""
        hidden = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = hidden.last_hidden_state.flatten(0, 1).index_select(0, rows)  # [N, D]
        if stats:
            return cast(TokenStats, self.head(hidden, target, stats=True, **options))
        if lam is None:
            lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
        return cast(SFTMixLoss, self.head(hidden, target, lam, **options))


def install_head(causal_lm: Any) -> SFTMixModel:
    """Put a ``LossHead`` in the place of the output embedding, sharing its parameters (a tie stays a tie).

    Raises ``ValueError`` when the model has no output embedding or it is not linear.
    """
    linear = causal_lm.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"model: expected {type(causal_lm).__name__} to have a linear output embedding, "
            f"got {type(linear).__name__}"
        )
    softcap, logit_scale = guess_head(causal_lm.config)
    causal_lm.set_output_embeddings(LossHead.from_linear(linear, softcap=softcap, logit_scale=logit_scale))
    return SFTMixModel(causal_lm)


def guess_head(config: Any) -> tuple[float | None, float]:
    """(softcap, logit scale) as the model's configuration names them: a first guess, checked afterwards."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if not isinstance(scale, int | float):
        scale = 1.0 / divisor if isinstance(divisor, int | float) and divisor else 1.0
    return (float(softcap) if isinstance(softcap, int | float) else None), float(scale)


@torch.no_grad()
def verify_head(model: SFTMixModel) -> None:
    """Compare our loss on a few tokens with that of the model's own logits; refuse a model that disagrees.

    The head is probed with the decoder's own hidden states and with enlarged ones. An auxiliary loss
    (mixture of experts) is refused too. Raises ``ValueError`` naming the model's class.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.vocab_size, (2, PROBE_TOKENS), generator=generator).to(model.device)
    with evaluating(model):
        largest = _compare(model, input_ids)
        with _enlarged(model.decoder, max(1.0, PROBE_LOGIT / max(largest, 1e-3))):
            _compare(model, input_ids)


def _compare(model: SFTMixModel, input_ids: Tensor) -> float:
    """The model's largest logit; ``ValueError`` unless our loss of ``input_ids`` [B, T] is its own."""
    name, batch = type(model.base).__name__, {"attention_mask": torch.ones_like(input_ids)}
    rows = torch.arange(input_ids.numel(), device=model.device).view_as(input_ids)[:, :-1].flatten()
    target = input_ids[:, 1:].flatten()
    output = model.base(input_ids, **batch, labels=input_ids, use_cache=False)
    ours = cast(SFTMixLoss, model(input_ids, **batch, rows=rows, target=target)).nll
    logits = output.logits[:, :-1].flatten(0, 1).float()  # [N, V]
    own = F.cross_entropy(logits, target, reduction="none")
    # The model rounds its logits to its dtype, we do not: a few of its roundings are allowed.
    largest = float(logits.abs().max())
    tolerance = 1e-4 + 4 * torch.finfo(output.logits.dtype).eps * largest
    error = float((ours - own).abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"model: {name} is not supported: the loss of its own logits differs by {error:.3g} (more than "
            f"{tolerance:.3g}) from that of a linear head on its decoder's last hidden state with softcap "
            f"{model.head.softcap} and logit scale {model.head.logit_scale:g}"
        )
    extra = abs(float(output.loss) - float(own.mean()))
    if getattr(output, "aux_loss", None) is not None or not extra <= tolerance:
        raise ValueError(
            f"model: {name} is not supported: it adds an auxiliary loss to next-token prediction (here "
            f"{extra:.3g}); switch it off in its configuration (mixture of experts: output_router_logits=False)"
        )
    return largest


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, the former mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _enlarged(decoder: nn.Module, gain: float) -> Iterator[None]:
    """Multiply the decoder's last hidden state by ``gain`` inside the block."""

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * gain
        return output

    handle = decoder.register_forward_hook(enlarge)
    try:
        yield
    finally:
        handle.remove()
