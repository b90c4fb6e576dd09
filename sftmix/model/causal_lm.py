"""The language model as the recipe trains it: any causal LM, its head replaced by ``LossHead``.

``SFTMixModel.forward`` is the model's own forward in which the call of the head becomes the loss: so whatever a model
does before its head (a scale, a cast, layers outside its decoder) is done, its auxiliary loss is the one that it
computes itself, and a sharded head is gathered by its own forward. What comes after the head is measured (``probe``)
and then checked: ``verify_head`` compares our loss with that of the model's own logits and refuses a model that
disagrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.model.documents import documents
from sftmix.model.packing import Packing, packed_inputs
from sftmix.model.probe import (
    Extra,
    Surroundings,
    enlarged,
    mean_square,
    measure,
    measure_extra,
    own_loss,
    probe_ids,
    rounding,
    run,
)
from sftmix.model.quantised import keep_bits
from sftmix_kernels import LossHead, SFTMixLoss, TokenStats

PROBE_LOGIT = 100.0  # the head is also probed with logits this large, where no softcap can hide


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter ``dtype``, in place; buffers keep theirs (rotary frequencies need float32)."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


class SFTMixModel(nn.Module):
    """A causal LM whose forward is the SFTMix loss.

    ``model`` is the causal LM (or the peft model around it) with a ``LossHead`` as output embedding.
    """

    def __init__(self, model: nn.Module, around: Surroundings, extra: Extra | None = None) -> None:
        super().__init__()
        self.model = model
        self.around, self.extra = around, extra or Extra()
        self.dtype: torch.dtype = self.head.weight.dtype  # what the model computes in, sharded or not
        # Each parameter's own data type: the model may keep some in float32.
        self.dtypes = {name: p.dtype for name, p in self.base.named_parameters(remove_duplicate=False)}
        self.aux_loss: Tensor | None = None  # of the last forward, 0-d, detached
        self.packing: Packing | None = None  # once it was measured
        self.training = model.training  # a new module would say True over a model in eval mode

    @property
    def base(self) -> Any:
        """The causal LM itself, without a peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]

    @property
    def decoder(self) -> nn.Module:
        """The part of the causal LM that holds its blocks; the causal LM itself where none was found."""
        blocks = self.around.blocks
        return cast(nn.Module, self.base.get_submodule(blocks.partition(".")[0]) if blocks else self.base)

    @property
    def head(self) -> LossHead:
        return cast(LossHead, self.base.get_submodule(self.around.head))

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
        attention_mask: Tensor | None,  # [B, T] int64
        rows: Tensor | None,  # [N] int64, indices into the flattened [B * T] hidden states
        target: Tensor | None,  # [N] int64
        lam: Tensor | None = None,  # [M] float32
        *,
        position_ids: Tensor | None = None,  # [1, T] int64, of a packed row
        starts: Sequence[int] | None = None,  # where the row's documents begin, and T
        stats: bool = False,
        top: bool = False,
        aux_share: float = 1.0,
        **options: Any,
    ) -> SFTMixLoss | TokenStats | Tensor:
        """The loss of the chosen rows, or with ``stats`` their ``TokenStats``; options of ``sftmix_loss``.

        ``top``, with ``stats``: also the most likely token of each row, ``predicted``, and its log-probability as the
        one column of ``token_logprob`` [N, 1], for another product with the head.

        Without rows the model's own logits [B, T, V]. A packed row [1, T] has ``position_ids`` and ``starts`` and no
        mask, for a model that ``packs`` says can read it.

        A model that adds an auxiliary or a z-loss to next-token loss adds it here too: the auxiliary loss of this
        batch with its own weight times ``aux_share``, the share of the step that this batch is; the z-loss on the rows
        that bear loss. Neither is in the statistics.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None and starts is not None:
            inputs.update(packed_inputs(self.base, position_ids, starts))
        if rows is None or target is None:
            with documents(starts):
                return cast(Tensor, self.base(**inputs).logits)
        if stats:
            options["stats"] = True
        else:
            options["lam"] = torch.empty(0, device=rows.device) if lam is None else lam
            if self.extra.z_loss:
                options.setdefault("z_loss", self.extra.z_loss)
        call = HeadCall(rows, target, options, top=top)
        with call.at(self.head), documents(starts):
            output = self.base(**inputs)
        result = cast(SFTMixLoss | TokenStats, call.result)
        self.aux_loss = None
        if stats or not self.extra.aux_weight:
            return result
        aux = output.aux_loss
        self.aux_loss = aux.detach()
        loss = cast(SFTMixLoss, result)
        return loss._replace(loss=loss.loss + self.extra.aux_weight * aux_share * aux)

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' ``generate`` of the causal LM; sharded by FSDP, of all processes together."""
        return self.base.generate(*args, **options)

    def logits(self, input_ids: Tensor) -> Tensor:
        """The model's own logits [B, T, V] of whole sequences [B, T], through the forward that FSDP knows."""
        return cast(Tensor, self(input_ids, torch.ones_like(input_ids), None, None))


class HeadCall:
    """One call of a head inside its model's forward, in which the head gives the loss of some rows.

    The model goes on with one zero a token in the place of logits. Hooks, not a wrapper: the head keeps its name and
    its class, and FSDP's own hooks come around these. ``entropy``: the rows' entropies [N] are wanted too, which costs
    another product with the head; no gradient. ``top``: so is the log-probability of the statistics' most likely token,
    at the same price. ``attached``: the zeros hang on the loss, for DDP, which looks for unused parameters from a
    model's output.
    """

    def __init__(
        self, rows: Tensor, target: Tensor, options: dict[str, Any], *, entropy: bool = False,
        attached: bool = False, top: bool = False,
    ) -> None:  # fmt: skip
        self.rows, self.target, self.options = (
            rows,
            target,
            dict(options, want_predicted=True) if top else options,
        )
        self.result: Any = None
        self.wants_entropy, self.entropy = entropy, cast(Tensor | None, None)
        self.attached, self.top = attached, top

    @contextmanager
    def at(self, head: nn.Module) -> Iterator[None]:
        handles = [
            head.register_forward_pre_hook(self._before, with_kwargs=True),
            head.register_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.result is None:
            raise ValueError(
                "model: expected a forward that calls its head, got one that does not: another package's loss (Liger, "
                "cut-cross-entropy) was put in its place since"
            )

    def _before(self, head: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["input"]  # [B, T, D]
        self.shape = hidden.shape[:-1]
        hidden = hidden.flatten(0, -2).index_select(0, self.rows)  # [N, D]
        # A model casts to its weight's type, which is float32 while it is sharded.
        weight = cast(LossHead, getattr(head, "base_layer", head)).weight
        dtype = getattr(head, "compute_dtype", weight.dtype)  # of a head whose shards stay in float32
        return (hidden.to(dtype), self.target), self.options

    def _after(self, head: nn.Module, args: Any, output: Any) -> Tensor:
        self.result = output
        if self.wants_entropy:
            with torch.no_grad():  # while a sharded weight is whole; its forward alone, without these hooks
                self.entropy = head.forward(args[0].detach(), self.target, stats=True).entropy
        if self.top:
            with torch.no_grad():
                tokens = torch.where(output.predicted < 0, -100, output.predicted)[:, None]  # of ignored rows
                found = head.forward(args[0], self.target, **{**self.options, "tokens": tokens})
            self.result = output._replace(token_logprob=found.token_logprob)
        zero = torch.zeros((), dtype=output[0].dtype, device=output[0].device)
        if self.attached:
            zero = zero + 0 * output[0]
        return zero.expand(*self.shape, 1)


def install_head(causal_lm: Any) -> SFTMixModel:
    """Put a ``LossHead`` in the place of the output embedding, sharing its parameters (a tie stays a tie).

    Scale and cap of the logits, and what the model adds to its loss, are measured. Raises ``ValueError`` when the
    model has no linear output embedding, or does something else with it (``probe``).
    """
    keep_bits(causal_lm)  # before anything runs in eval mode
    training = causal_lm.training
    causal_lm.eval()
    around = measure(causal_lm)
    linear = causal_lm.get_submodule(around.head)
    extra = measure_extra(causal_lm, linear.weight)
    head = LossHead.from_linear(linear, softcap=around.softcap, logit_scale=around.logit_scale)
    causal_lm.set_submodule(around.head, head)
    return SFTMixModel(causal_lm.train(training), around, extra)


@torch.no_grad()
def verify_head(model: SFTMixModel) -> None:
    """Compare our loss on a few tokens with that of the model's own logits; refuse a model that disagrees.

    The head is probed with its own inputs and with enlarged ones. Raises ``ValueError`` naming the model's class.
    """
    input_ids = probe_ids(model.vocab_size, model.device)
    with evaluating(model):
        largest = _compare(model, input_ids)
        with enlarged(model.head, max(1.0, PROBE_LOGIT / max(largest, 1e-3))):
            _compare(model, input_ids)


def _compare(model: SFTMixModel, input_ids: Tensor) -> float:
    """The model's largest logit; ``ValueError`` unless our loss of ``input_ids`` [B, T] is its own."""
    name, mask = type(model.base).__name__, torch.ones_like(input_ids)
    rows = torch.arange(input_ids.numel(), device=model.device).view_as(input_ids)[:, :-1].flatten()
    target = input_ids[:, 1:].flatten()
    output = run(model.base, input_ids, labels=input_ids)
    ours = cast(SFTMixLoss, model(input_ids, mask, rows=rows, target=target))
    logits = output.logits[:, :-1].flatten(0, 1).float()  # [N, V]
    own = F.cross_entropy(logits, target, reduction="none")
    # The model rounds its logits to its dtype, we do not: a few of its roundings are allowed.
    largest = float(logits.abs().max())
    tolerance = 1e-4 + 4 * rounding(output.logits, model.head.weight) * largest
    error = float((ours.nll - own).abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"model: {name} is not supported: the loss of its own logits differs by {error:.3g} (more than "
            f"{tolerance:.3g}) from that of a linear head on its hidden states with softcap "
            f"{model.head.softcap} and logit scale {model.head.logit_scale:g}"
        )
    aux = 0.0 if model.aux_loss is None else model.extra.aux_weight * float(model.aux_loss)
    squared = mean_square(output.logits) if model.extra.z_loss else 0.0
    expected = own_loss(output, input_ids) + aux + model.extra.z_loss * squared
    off = abs(float(output.loss) - expected)
    if not off <= tolerance + 1e-5 * abs(expected):
        raise ValueError(
            f"model: {name} is not supported: its own loss of labels differs by {off:.3g} from next-token loss with "
            f"{model.extra.aux_weight:g} of its auxiliary loss and a z-loss of {model.extra.z_loss:g}"
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
