"""The fused next-token loss inside any transformers causal LM: ``patch_lm_head`` and ``unpatch_lm_head``.

With labels the patched forward makes no logits: the head turns the hidden states of the rows that bear loss into the
loss, next-token over ``num_items_in_batch`` or their number, and the model's own auxiliary loss is added as it adds
it. Without labels it is the model's own forward. The head's module is swapped for one with the same parameters, so
optimizers, ties, checkpoints and adapters see no change.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sftmix.model.causal_lm import HeadCall, SFTMixModel, install_head, verify_head
from sftmix.model.probe import output_embedding
from sftmix_kernels import adapt_head

Model = TypeVar("Model", bound=nn.Module)
IGNORED = -100
_STATE = "_sftmix_patch"
# Packages that put a forward of their own, with their own loss, in the place of the model's.
OTHERS = ("liger_kernel", "cut_cross_entropy", "trl", "unsloth", "unsloth_zoo", "axolotl")


def patch_lm_head(model: Model, *, impl: str | None = None, verify: bool = True) -> Model:
    """Let ``model(input_ids, ..., labels=labels)`` compute its loss from hidden states; the model itself, patched.

    ``model``: a causal LM of transformers or a peft model around one. ``labels`` [B, T] as transformers has them, -100
    for what bears no loss, or ``shift_labels`` [B, T], which are not shifted. The output's ``loss`` is 0-d float32 and
    its ``logits`` None; ``sftmix`` holds the rows' values (``SFTMixLoss``). ``impl``: of ``sftmix_loss``. ``verify``
    compares the loss with that of the model's own logits, on a few tokens.

    Raises ``ValueError`` for a model that is patched already, by this function or another package's head (Liger,
    cut-cross-entropy, TRL, Unsloth, axolotl), for adapters on a head that is not ours yet, and for a model whose head
    cannot be replaced.
    """
    base = _base(model)
    if is_patched(base):
        raise ValueError(
            f"model: expected one that is not patched, got {type(base).__name__} with patch_lm_head's loss"
        )
    other = patched_by(base)
    if other is not None:
        raise ValueError(
            f"model: expected its own forward, got one of {other}, whose head would stand beside this one"
        )
    head = base.get_output_embeddings()
    if head is not None and hasattr(head, "base_layer"):
        raise ValueError(
            "model: expected a head without adapters, got some: patch first, then add them; they train then"
        )
    name = output_embedding(base)
    linear = _Linear(name, base.get_submodule(name))
    made = install_head(base)
    if verify:
        verify_head(made)
    watch = base.register_forward_pre_hook(_refuse_another)
    base.__dict__[_STATE] = _Patch(made, linear, base.__dict__.get("forward"), watch)
    base.forward = types.MethodType(_forward(base.forward, made, impl), base)
    return model


def unpatch_lm_head(model: Model) -> Model:
    """Undo ``patch_lm_head``. Raises ``ValueError`` for a model that is not patched, or was changed again since."""
    base = _base(model)
    patch = base.__dict__.get(_STATE)
    if patch is None:
        raise ValueError(
            f"model: expected one that patch_lm_head patched, got {type(base).__name__} without it"
        )
    if not hasattr(base.__dict__.get("forward"), "__wrapped__"):
        raise ValueError(
            "model: expected patch_lm_head's forward, got another one: undo first what came after it"
        )
    if patch.forward is None:
        del base.forward
    else:
        base.forward = patch.forward
    patch.linear.put_back(base)
    patch.watch.remove()
    del base.__dict__[_STATE]
    return model


class _Linear:
    """The head that was there, to be put back with the parameters that ours has by then."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def put_back(self, base: nn.Module) -> None:
        ours = base.get_submodule(self.name)
        if hasattr(ours, "base_layer"):
            raise ValueError("model: expected a head without adapters, got some: merge or remove them first")
        self.module.weight = ours.weight  # type: ignore[assignment]
        if getattr(ours, "bias", None) is not None:
            self.module.bias = ours.bias  # type: ignore[assignment]
        self.module.train(ours.training)
        base.set_submodule(self.name, self.module)


class _Patch:
    """What undoing takes; in the model's __dict__, not among its modules."""

    def __init__(self, made: SFTMixModel, linear: _Linear, forward: Any, watch: Any) -> None:
        self.made, self.linear, self.forward, self.watch = made, linear, forward, watch


def _refuse_another(base: nn.Module, args: Any) -> None:
    """Before each forward of a patched model: another package's, put over it since, would use its own loss."""
    other = patched_by(base, on_class=False)  # one on the class is never reached
    if other is not None:
        raise ValueError(
            f"model: expected patch_lm_head's forward, got one of {other}, which was put over it: use one of the two"
        )


def _base(model: Any) -> Any:
    """The causal LM itself, without a peft wrapper."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a causal LM of transformers, got {type(model).__name__}")
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # torch's types know no methods


def is_patched(base: nn.Module) -> bool:
    """Whether ``patch_lm_head`` patched this causal LM."""
    return getattr(base, _STATE, None) is not None


def patched_by(base: nn.Module, *, on_class: bool = True) -> str | None:
    """The package in ``OTHERS`` that put its own forward in the place of the model's, on it or on its class."""
    forwards = [base.__dict__.get("forward"), type(base).forward if on_class else None]
    for function in (function for forward in forwards for function in _layers(forward)):
        code = getattr(function, "__code__", None)
        parts = code.co_filename.replace("\\", "/").split("/") if code is not None else []
        found = [name for name in OTHERS if name in parts]
        if found:
            return found[0]
    return None


def _layers(forward: Any) -> Iterator[Any]:
    """A forward and the functions that it wraps."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if isinstance(function, functools.partial):
            forward = function.func
            continue
        yield function
        forward = getattr(function, "__wrapped__", None)


def _forward(original: Callable[..., Any], made: SFTMixModel, impl: str | None) -> Callable[..., Any]:
    """The patched forward of a model; its signature is the model's own, which ``generate`` and Trainer read."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        if labels is None and shifted is None:
            return original(*args, **kwargs)
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict: expected True with labels and patch_lm_head, got False")
        rows, target = _rows(labels, shifted)
        options: dict[str, Any] = {
            "lam": torch.empty(0, device=rows.device), "mixup_weight": 0.0, "impl": impl,
            "ntp_denominator": max(1, rows.numel()) if items is None else items,
        }  # fmt: skip
        if made.extra.z_loss:
            options["z_loss"] = made.extra.z_loss
        head = adapt_head(made.head)  # adapters that peft put on it since
        call = HeadCall(rows, target, options)
        kwargs.setdefault("use_cache", False)
        with call.at(head):
            output = original(*args, **kwargs)
        loss = call.result.loss
        aux = getattr(output, "aux_loss", None)
        if made.extra.aux_weight and aux is not None:
            loss = loss + made.extra.aux_weight * aux
        output.loss, output.logits = loss, None
        output.sftmix = call.result
        return output

    told = inspect.signature(original)
    forward.__signature__ = told.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *told.parameters.values()]
    )
    return forward


def _rows(labels: Tensor | None, shifted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [N] that bear loss, indices into the flattened positions, and the token that each predicts [N]."""
    if shifted is None:
        shifted = nn.functional.pad(cast(Tensor, labels)[:, 1:], (0, 1), value=IGNORED)
    flat = shifted.flatten()
    rows = (flat != IGNORED).nonzero(as_tuple=True)[0]
    return rows, flat[rows]
