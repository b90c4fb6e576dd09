"""The custom operators: schema, fake kernels and registered autograd.

Two algorithms, each a forward, a backward, and a backward that adds dweight into a main gradient:

    terms_fwd, terms_bwd, terms_bwd_into    statistics only; the backward makes the logits again, for any upstream
    made_fwd, made_bwd, made_bwd_into       gradients in the forward, for a scalar loss; the backward multiplies them

A call is their arguments, flat (call.py); which engine runs is one of them. A main gradient is not saved as autograd
saves tensors, because the backward of one micro-batch may change it between forward and backward of another.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from . import terms
from .call import (
    DIFFERENTIABLE,
    NAMESPACE,
    SCHEMA,
    TENSORS,
    Call,
    Coefficients,
    Gradients,
    Kept,
    Statistics,
    Upstream,
    empty_gradients,
)
from .checks import readable
from .terms import Terms

Tensors = tuple[Tensor, ...]
CALL, CALL_INTO = (SCHEMA.replace("{mutated}", mutated) for mutated in ("", "(a!)"))
UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in Terms._fields[:5])
KEPT = "Tensor column, Tensor row_coef, Tensor pair_coef, Tensor entropy, Tensor row_carry, Tensor pair_carry"
GRADIENTS = ", ".join(f"Tensor {name}" for name in Gradients._fields)
NUM_TERMS, NUM_KEPT = len(Terms._fields), 6


def operator(name: str, arguments: str, number: int, mutates: tuple[str, ...] = ()) -> Any:
    """A decorator: ``function`` as the operator ``name`` that returns ``number`` tensors."""
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * number)})"
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates, schema=schema)


def engine_of(name: str) -> ModuleType:
    if name == "chunked":
        from . import chunked

        return chunked
    from . import fused

    return fused


def made_by(call: Call, step: str) -> Any:
    """A step of terms.py, as the engine has it where it has one of its own."""
    return getattr(engine_of(call.engine), step, None) or getattr(terms, step)


def local(call: Call, column: Tensor) -> tuple[Call, Tensor]:
    """The call and the targets as this shard's columns; themselves where the vocabulary is whole."""
    if call.place is None:
        return call, column
    from .vocab_parallel import own_columns

    size, place = call.weight.shape[0], call.place
    tokens = None if call.tokens is None else own_columns(call.tokens, place, size)
    return call._replace(tokens=tokens), own_columns(column, place, size)


def statistics(call: Call, column: Tensor) -> Statistics:
    """Of all columns: an engine's, and with shards what all of them say together."""
    own, own_column = local(call, column)
    if call.place is None:
        return cast(Statistics, engine_of(call.engine).statistics(call, column))
    from .vocab_parallel import of_no_columns, whole

    found = engine_of(call.engine).statistics(own, own_column) if call.weight.shape[0] else of_no_columns(own)
    return whole(found, call, column)


# --- gradients made again ------------------------------------------------------------------------------------------


@operator("terms_fwd", CALL, NUM_TERMS + NUM_KEPT)
def terms_fwd(*arguments: Any) -> Tensors:
    """Terms, then what the backward recomputes from, which is no memory of theirs: KEPT."""
    call = Call(*arguments)
    coef = made_by(call, "coefficients")(call)
    found = statistics(call, coef.column)
    kept = (*coef, found.entropy, found.row_carry, found.pair_carry)
    return (*made_by(call, "finish")(call, coef, found), *kept)


def _fake_terms(call: Call) -> tuple[Tensors, Tensors]:
    """Terms and statistics, empty."""
    (num_rows, _, num_pairs), wanted, dtype = call.sizes, call.wanted, call.dtype

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return call.hidden.new_empty(shape, dtype=kind)

    tokens = (0, 0) if call.tokens is None else call.tokens.shape
    empty = Terms(
        new(), new(num_rows), new(num_rows), new(num_rows if wanted.entropy else 0), new(*tokens), new(num_rows),
        new(num_rows, kind=torch.bool), new(num_rows if wanted.predicted else 0, kind=torch.int64), new(num_pairs),
        new(),
    )  # fmt: skip
    coef = Coefficients(
        new(num_rows, kind=torch.int64), *(new(n, kind=torch.float64) for n in (num_rows, num_pairs))
    )
    return empty, (*coef, torch.empty_like(empty.entropy), new(3, num_rows), new(4, num_pairs))


@terms_fwd.register_fake
def _(*arguments: Any) -> Tensors:
    found, kept = _fake_terms(Call(*arguments))
    return (*found, *kept)


@operator("terms_bwd", f"{UPSTREAM}, {CALL}, {KEPT}", 5)
def terms_bwd(*arguments: Any) -> Tensors:
    """Gradients of hidden, weight, bias, low and up; (0,) where not needed."""
    return _gradients(*arguments)


@operator("terms_bwd_into", f"{UPSTREAM}, {CALL_INTO}, {KEPT}", 5, ("main_grad",))
def terms_bwd_into(*arguments: Any) -> Tensors:
    """The same, and main_grad += dweight, which is (0,)."""
    return _gradients(*arguments)


def of_shard(call: Call, column: Tensor, kept: Kept, upstream: Upstream) -> Gradients:
    """Gradients of this shard's columns; zeros where it has none."""
    own, column = local(call, column)
    if not call.weight.shape[0]:
        return Gradients(*(each.zero_() for each in empty_gradients(call)))
    return cast(Gradients, engine_of(call.engine).gradients(own, column, kept, upstream))


def _gradients(*arguments: Any) -> Tensors:
    grads, rest, kept = arguments[:5], arguments[5:-NUM_KEPT], arguments[-NUM_KEPT:]
    call, coef = Call(*rest), Coefficients(*kept[:3])
    upstream = made_by(call, "upstream_of")(call, coef, kept[4][2], grads)
    entropy, row_carry, pair_carry = kept[3:]
    again = Kept(row_carry, pair_carry, entropy)
    if call.place is None:
        return cast(Tensors, engine_of(call.engine).gradients(call, coef.column, again, upstream))
    found = of_shard(call, coef.column, again, upstream)
    from .vocab_parallel import sum_over_shards

    dtype, group = call.hidden.dtype, call.group_name
    return found._replace(
        dhidden=sum_over_shards(found.dhidden, dtype, group), dlow=sum_over_shards(found.dlow, dtype, group)
    )


for bwd in (terms_bwd, terms_bwd_into):
    bwd.register_fake(lambda *arguments: empty_gradients(Call(*arguments[5:-NUM_KEPT])))


def refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("sftmix_loss: double backward is not supported; use impl='reference' for it")


def refuse_grad_mode() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sftmix_loss: double backward is not supported (create_graph=True beside main_grad)"
        )


def _setup(ctx: Any, call: Call, kept: Tensors) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.main_grad = call.main_grad
    ctx.rest = call[TENSORS:]
    ctx.save_for_backward(*call._replace(main_grad=None)[:TENSORS], *kept)


def of_inputs(gradients: Tensors, call: Call) -> tuple[Tensor | None, ...]:
    """A gradient for each of the operator's arguments; None where there is none."""
    found = [each if needed else None for each, needed in zip(gradients, call.needs, strict=True)]
    if call.main_grad is not None:
        found[DIFFERENTIABLE.index("weight")] = None
    return (*found, *(None,) * (len(call) - len(DIFFERENTIABLE)))


def _terms_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _setup(ctx, Call(*inputs), output[NUM_TERMS:])


def _terms_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads[:5]):  # an undefined upstream gradient is one of zeros
        return (None,) * len(Call._fields)
    saved = ctx.saved_tensors
    call = Call(*saved[:TENSORS], *ctx.rest)._replace(main_grad=ctx.main_grad)
    if call.main_grad is None:
        return of_inputs(terms_bwd(*grads[:5], *call, *saved[TENSORS:]), call)
    refuse_grad_mode()
    return of_inputs(terms_bwd_into(*grads[:5], *call, *saved[TENSORS:]), call)


terms_fwd.register_autograd(_terms_autograd, setup_context=_terms_setup)
terms_bwd.register_autograd(refuse_double_backward)


# --- gradients made in the forward ---------------------------------------------------------------------------------

NUM_MADE = NUM_TERMS + 1 + len(Gradients._fields)


@operator("made_fwd", CALL, NUM_MADE)
def made_fwd(*arguments: Any) -> Tensors:
    """Terms, then scale and the gradients of loss / scale, of weight, bias and up in the dtype of sums."""
    call = Call(*arguments)
    coef = made_by(call, "coefficients")(call)
    # dweight is made here whether or not a main gradient is to take it.
    engine, alone = engine_of(call.engine), call._replace(main_grad=None)
    found, scale, gradients = engine.statistics_with_gradients(alone, coef)
    return (*made_by(call, "finish")(call, coef, found), scale, *gradients)


@made_fwd.register_fake
def _(*arguments: Any) -> Tensors:
    call = Call(*arguments)
    return (*_fake_terms(call)[0], call.hidden.new_empty((), dtype=call.dtype), *_fake_made(call))


def _fake_made(call: Call) -> Gradients:
    return empty_gradients(call._replace(main_grad=None), call.dtype)


MADE, WAY = f"Tensor grad_loss, Tensor scale, {GRADIENTS}", "ScalarType weight_dtype, str engine"


@operator("made_bwd", f"{MADE}, {WAY}", 5)
def made_bwd(grad_loss: Tensor, scale: Tensor, *rest: Any) -> Tensors:
    """The forward's gradients times ``scale * grad_loss``, multiplied in float32 and rounded once."""
    *made, weight_dtype, engine = rest
    return _scaled(grad_loss, scale, tuple(made), weight_dtype, engine)


@operator("made_bwd_into", f"{MADE}, Tensor(a!) main_grad, {WAY}", 5, ("main_grad",))
def made_bwd_into(grad_loss: Tensor, scale: Tensor, *rest: Any) -> Tensors:
    """The same, but for dweight, which is added to main_grad, and (0,)."""
    dhidden, dweight, *others, main_grad, weight_dtype, engine = rest
    if dweight.numel():
        main_grad.addcmul_(dweight, (scale * grad_loss).to(dweight.dtype))
    return _scaled(grad_loss, scale, (dhidden, dweight.new_empty(0), *others), weight_dtype, engine)


def _scaled(
    grad_loss: Tensor, scale: Tensor, made: Tensors, weight_dtype: torch.dtype, engine: str
) -> Tensors:
    scaled = engine_of(engine).scaled
    factor, dtype = (scale * grad_loss).to(scale.dtype), made[0].dtype
    dtypes = (dtype, weight_dtype, weight_dtype, dtype, weight_dtype)
    return tuple(scaled(each, factor, kind) for each, kind in zip(made, dtypes, strict=True))


@made_bwd.register_fake
def _(grad_loss: Tensor, scale: Tensor, *rest: Any) -> Tensors:
    return _fake_scaled(*rest)


@made_bwd_into.register_fake
def _(grad_loss: Tensor, scale: Tensor, dhidden: Tensor, dweight: Tensor, *rest: Any) -> Tensors:
    return _fake_scaled(dhidden, dweight.new_empty(0), *rest[:3], *rest[-2:])


def _fake_scaled(*rest: Any) -> Tensors:
    dhidden, dweight, dbias, dlow, dup, dtype, _ = rest
    dweight, dbias, dup = (torch.empty_like(each, dtype=dtype) for each in (dweight, dbias, dup))
    return torch.empty_like(dhidden), dweight, dbias, torch.empty_like(dlow), dup


def _made_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    call = Call(*inputs)
    ctx.set_materialize_grads(False)
    ctx.main_grad, ctx.plan, ctx.beside = call.main_grad, call.plan, (call.weight.dtype, call.engine)
    ctx.save_for_backward(*output[NUM_TERMS:])


def _may_hand_over(grad_loss: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether the saved gradients themselves may be given away: float32 on a CPU, an upstream of 1, and a graph that
    is not kept, so that nobody reads them again. It saves a second [V, D]."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is None or not readable(grad_loss) or torch._C._functorch.is_functorch_wrapped_tensor(grad_loss):
        return False
    is_final = dtype == weight_dtype and not keeps() and not torch.is_grad_enabled()
    return is_final and type(grad_loss) is Tensor and bool(grad_loss == 1)


def _made_autograd(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(Call._fields)
    scale, *made = ctx.saved_tensors
    nothing: tuple[Any, ...] = (None,) * len(Call._fields)
    call = Call(*nothing)._replace(plan=ctx.plan, main_grad=ctx.main_grad)
    if ctx.main_grad is not None:
        refuse_grad_mode()
        return of_inputs(made_bwd_into(grad_loss, scale, *made, ctx.main_grad, *ctx.beside), call)
    if not _may_hand_over(grad_loss, made[1].dtype, ctx.beside[0]):
        made = made_bwd(grad_loss, scale, *made, *ctx.beside)
    return of_inputs(tuple(made), call)


made_fwd.register_autograd(_made_autograd, setup_context=_made_setup)
made_bwd.register_autograd(refuse_double_backward)


def run(call: Call, made: bool) -> Terms:
    """A call by one algorithm or, with gradients ``made`` in the forward, the other."""
    return Terms(*(made_fwd if made else terms_fwd)(*call)[:NUM_TERMS])
