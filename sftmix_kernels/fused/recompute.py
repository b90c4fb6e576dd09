"""Gradients by the ``recompute`` schedule: walk the vocabulary in slices, never more logits than one slice.

    P = softmax of A, B and X, recomputed as exp(z - lse); J = f'(affine) = s (1 - (z / cap)^2), or s without a cap
    dA = a_c J_A ((1 + 2 z lse_A) P_A - (1 - e) 1[y_c] - e / V),  dB = a_u J_B (the same of B and y_u)
    dX = b J_X (P_X - lam 1[y_c] - (1 - lam) 1[y_u])
    G_c = dA + lam dX,  G_u = dB + (1 - lam) dX          dlogits = (G_c; G_u), one slice (N, V_s)
    dhidden = sum over slices G W_slice (float32),  dweight_slice = G^T hidden,  dbias_slice = sum over rows G
    dlow = sum over slices G up_slice (float32),    dup_slice = G^T low          with low-rank factors

with label smoothing e and z-loss z. At a target the residual comes from the forward's nll: w the label's mass there,
expm1(-nll) + (1 - w) where w >= 1/2 and exp(-nll) - w elsewhere, so that p = 0.999999 keeps its digits. The forward's
lse was rounded; what rounding took scales the row's coefficient. float16 divides all coefficients by their maximum,
which returns in float32 at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .configs import Tile, choose_slice_width
from .exponentials import capped, exp
from .products import add_product, write_product
from .tiles import (
    Problem,
    RowPart,
    add_low_rank,
    any_inside,
    can_describe,
    launch_arguments,
    load_target,
    logits_tile,
    on_device,
    operand,
    row_parts,
    tile_coordinates,
    with_bias,
)


class GradientTerms(NamedTuple):
    """Per-row numbers the kernel multiplies and substitutes; float32, coefficients folded in."""

    rows: Tensor  # (3, N) lse, a (1 + 2 z lse) exp(-low), g at the target; with smoothing (4, N): a e / V
    pairs: Tensor  # (5, M) lse_x, b exp(-low), b (p - w) at y_c, the same at y_u, lam
    scale: Tensor | None  # () what the products are multiplied by in float32, None for 1


@triton.jit
def _logits_and_slope(
    affine,  # (rows, columns) W h
    bias,
    first_v,
    vocab_size,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """f(affine + bias) and f' over the scale."""
    z = with_bias(affine, bias, first_v + tl.arange(0, affine.shape[1]), vocab_size)
    return capped(z, SOFTCAP, LOGIT_SCALE, EXACT)


@triton.jit
def _scaled_softmax(z, slope, terms, stride_terms, SMOOTHED: tl.constexpr):
    """(coefficient * exp(z - lse) - uniform) * slope.

    terms: pointers to each row's lse, then its coefficient, and in the fourth plane what smoothing subtracts.
    """
    g = exp(z - tl.load(terms)[:, None]) * tl.load(terms + stride_terms)[:, None]
    if SMOOTHED:
        g -= tl.load(terms + 3 * stride_terms)[:, None]
    return g * slope


@triton.jit
def _at_target(g, slope, residual, column, hit):
    """g, with residual * slope where a row's target column is; hit says whether any is in this tile."""
    if hit:
        here = tl.arange(0, g.shape[1])[None, :] == column[:, None]
        g = tl.where(here, tl.load(residual)[:, None] * slope, g)
    return g


@triton.jit
def _store_tile(out, value, first_n, first_v, num_rows, vocab_size, stride_on, USE_DESCRIPTORS: tl.constexpr):
    if USE_DESCRIPTORS:
        out.store([first_n.to(tl.int32), first_v], value.to(out.dtype))
    else:
        offs_n = first_n + tl.arange(0, value.shape[0])
        offs_v = first_v + tl.arange(0, value.shape[1])
        ptrs = out + offs_n[:, None] * stride_on + offs_v[None, :]
        mask = (offs_n < num_rows)[:, None] & (offs_v < vocab_size)[None, :]
        tl.store(ptrs, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sftmix_recompute_kernel(
    hidden_c,  # (rows, D) pointer or descriptor
    hidden_u,  # (rows, D)
    weight,  # (V_s, D) the slice's rows
    bias,  # (V_s,) or None
    target_c,  # (rows,) int64
    target_u,  # (rows,)
    row_terms_c,  # (3 or 4, N) from the confident rows
    row_terms_u,  # (3 or 4, N) from the partners
    pair_terms,  # (5, rows)
    dlogits_c,  # (rows, V_s) pointer or descriptor
    dlogits_u,  # (rows, V_s)
    low_c,  # (rows, r), or None with all that follows to stride_uv
    low_u,  # (rows, r)
    up,  # (V_s, r)
    rank,
    stride_ln,
    stride_uv,
    num_rows,
    vocab_size,  # V_s
    hidden_size,
    first_column,
    stride_hn,
    stride_wv,
    stride_on,
    stride_terms,
    num_blocks_n,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    PAIRED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    block_n, block_v = tile_coordinates(num_blocks_n, tl.cdiv(vocab_size, BLOCK_V), GROUP_N)
    first_n, first_v = block_n * BLOCK_N, block_v.to(tl.int32) * BLOCK_V
    a, b = logits_tile(
        hidden_c, hidden_u, weight, first_n, first_v, num_rows, vocab_size, hidden_size, stride_hn, stride_wv,
        PAIRED, USE_DESCRIPTORS, EVEN_D, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    if up is not None:
        a, b = add_low_rank(
            a, b, low_c, low_u, up, first_n, first_v, num_rows, vocab_size, rank, stride_ln, stride_uv, PAIRED,
            PRECISION, BLOCK_R,
        )  # fmt: skip
    # Rows past the end repeat the last one's numbers: finite, and never stored.
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), num_rows - 1)
    y_c = load_target(target_c, rows, rows < num_rows, first_column, vocab_size) - first_v
    hit_c = any_inside(y_c, BLOCK_V)
    if PAIRED:
        y_u = load_target(target_u, rows, rows < num_rows, first_column, vocab_size) - first_v
        hit_u = any_inside(y_u, BLOCK_V)
        share = tl.load(pair_terms + 4 * num_rows + rows)
        x = share[:, None] * a + (1.0 - share)[:, None] * b
        z, slope = _logits_and_slope(x, bias, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT)
        g_x = _scaled_softmax(z, slope, pair_terms + rows, num_rows, False)
        g_x = _at_target(g_x, slope, pair_terms + 2 * num_rows + rows, y_c, hit_c)
        g_x = _at_target(g_x, slope, pair_terms + 3 * num_rows + rows, y_u, hit_u)
        z, slope = _logits_and_slope(b, bias, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT)
        g_u = _scaled_softmax(z, slope, row_terms_u + rows, stride_terms, SMOOTHED)
        g_u = _at_target(g_u, slope, row_terms_u + 2 * stride_terms + rows, y_u, hit_u)
        g_u += (1.0 - share)[:, None] * g_x
        _store_tile(dlogits_u, g_u, first_n, first_v, num_rows, vocab_size, stride_on, STORE_DESCRIPTORS)
    z, slope = _logits_and_slope(a, bias, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT)
    g_c = _scaled_softmax(z, slope, row_terms_c + rows, stride_terms, SMOOTHED)
    g_c = _at_target(g_c, slope, row_terms_c + 2 * stride_terms + rows, y_c, hit_c)
    if PAIRED:
        g_c += share[:, None] * g_x
    _store_tile(dlogits_c, g_c, first_n, first_v, num_rows, vocab_size, stride_on, STORE_DESCRIPTORS)


def _residual(nll: Tensor, mass: Tensor, rest: Tensor) -> Tensor:
    """p - mass at a target whose -log p is ``nll``, without cancellation near 1; ``rest`` is 1 - mass."""
    return torch.where(mass >= 0.5, torch.expm1(-nll) + rest, torch.exp(-nll) - mass)


def _gradient_terms(
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    row_carry: Tensor,  # (3, N)
    pair_carry: Tensor,  # (4, M)
    *,
    logit_scale: float,
    smoothing: tuple[float, float | Tensor],
    z_loss: float,
    normalise: bool,
) -> GradientTerms:
    """Fold coefficients, what the rounding of lse took, and the labels into the numbers the kernel needs.

    ``smoothing`` is e and e / V. Coefficients are normalised to at most 1 where dlogits are float16.
    """
    num_pairs = lam.shape[0]
    row_coef, pair_coef = row_coef.float() * logit_scale, pair_coef.float() * logit_scale
    scale = None
    if normalise:
        scale = torch.cat((row_coef, pair_coef)).abs().amax()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        row_coef, pair_coef = row_coef / scale, pair_coef / scale
    lse, low, nll = row_carry
    bulk, own = row_coef * torch.exp(-low), torch.expm1(-nll)
    mass, uniform = smoothing
    if mass:  # (p - 1) + e would keep the digits of 1, not those of 1 - e
        own = (1 - mass) * own + (mass * torch.exp(-nll) - uniform)
    if z_loss:
        bulk, own = bulk * (1 + 2 * z_loss * lse), own + 2 * z_loss * lse * torch.exp(-nll)
    rows = torch.stack((lse, bulk, row_coef * own, *((row_coef * uniform,) if mass else ())))
    lse_x, low_x, nll_c, nll_u = pair_carry
    # Where both labels are one column the partner's number, written last, stands for the whole label.
    same = target[:num_pairs] == target[num_pairs : 2 * num_pairs]
    mass_u, rest_u = torch.where(same, 1.0, 1 - lam), torch.where(same, 0.0, lam)
    at_c, at_u = _residual(nll_c, lam, 1 - lam), _residual(nll_u, mass_u, rest_u)
    pairs = torch.stack((lse_x, pair_coef * torch.exp(-low_x), pair_coef * at_c, pair_coef * at_u, lam))
    return GradientTerms(rows, pairs, scale)


def _recompute_slice(
    problem: Problem,  # weight (V_s, D), bias (V_s,)
    terms: GradientTerms,
    part: RowPart,
    dlogits: Tensor,  # (N, V_s)
    *,
    first_column: int,
    tile: Tile,
) -> None:
    """Launch the kernel for one run of rows and one slice of the vocabulary."""
    out_c, out_u = dlogits[part.first], dlogits[part.second]
    store_descriptors = tile.use_descriptors and can_describe(out_c) and can_describe(out_u)
    block = (tile.block_n, tile.block_v)
    num_tiles = triton.cdiv(part.size, tile.block_n) * triton.cdiv(dlogits.shape[1], tile.block_v)
    _sftmix_recompute_kernel[(num_tiles,)](
        **launch_arguments(problem, part, tile),
        row_terms_c=terms.rows[:, part.first],
        row_terms_u=terms.rows[:, part.second],
        pair_terms=terms.pairs,
        dlogits_c=operand(out_c, block, store_descriptors),
        dlogits_u=operand(out_u, block, store_descriptors),
        first_column=first_column,
        stride_on=dlogits.stride(0),
        stride_terms=terms.rows.stride(0),
        SMOOTHED=terms.rows.shape[0] == 4,
        STORE_DESCRIPTORS=store_descriptors,
    )


def fused_backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64, -1 where the row is ignored
    lam: Tensor,  # (M,) float32
    row_coef: Tensor,  # (N,) float32, 0 at ignored rows
    pair_coef: Tensor,  # (M,) float32, 0 at pairs with an ignored member
    row_carry: Tensor,  # (3, N) FusedStats.row_carry
    pair_carry: Tensor,  # (4, M) FusedStats.pair_carry
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    total_vocab: int | Tensor | None = None,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
    need_dhidden: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = False,
    need_dlow: bool = False,
    need_dup: bool = False,
    main_grad: Tensor | None = None,  # (V, D) float32
    scratch_bytes: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """dhidden, dweight and dbias in the dtypes of their primals, (0,) where not needed; no host synchronisation.

    With low-rank factors, dlow and dup come after them. With ``main_grad`` dweight is added there, a slice at a time
    and unrounded, and none is made.

    The coefficients hold everything that multiplies a row's or pair's loss. ``scratch_bytes`` bounds the dlogits slice
    (N, V_s), at least one tile of columns; None sizes it for the L2 cache. Sums are float32 throughout. ``total_vocab``
    is the V of label smoothing's e / V where ``weight`` is a shard (an int or a 0-d tensor; None: its own columns).

    Memory above inputs and gradients: N V_s itemsize, O(N + M) of statistics and, with 16-bit inputs, a float32 dhidden
    4 N D; float16 adds a float32 product 4 V_s D. Off GPUs of capability 8.0, which have no 16-bit product with a
    float32 result, copies of one product's operands: 4 (N V_s + max(N, V_s) D).

    Raises ValueError on CPU tensors outside the interpreter.
    """
    problem = Problem.prepare(
        hidden, weight, target, bias=bias, softcap=softcap, logit_scale=logit_scale, low=low, up=up
    )
    for name, carry, (planes, size) in (  # of the forward's FusedStats
        ("row_carry", row_carry, (3, hidden.shape[0])),
        ("pair_carry", pair_carry, (4, lam.shape[0])),
    ):
        checks.check_tensor(name, carry, {"planes": planes, "size": size}, (torch.float32,))
    gradients: tuple[Tensor, ...] = (
        torch.zeros(hidden.shape if need_dhidden else (0,), dtype=torch.float32, device=hidden.device),
        weight.new_empty(weight.shape if need_dweight and main_grad is None else (0,)),
        weight.new_empty(weight.shape[:1] if need_dbias else (0,)),
    )
    if low is not None and up is not None:
        shape = low.shape if need_dlow else (0,)
        gradients += (
            torch.zeros(shape, dtype=torch.float32, device=hidden.device),
            up.new_empty(up.shape if need_dup else (0,)),
        )
    if hidden.shape[0] == 0:
        return tuple(gradient.zero_().to(hidden.dtype) for gradient in gradients)
    columns = weight.shape[0] if total_vocab is None else total_vocab
    terms = _gradient_terms(
        target, lam, row_coef, pair_coef, row_carry, pair_carry, logit_scale=logit_scale,
        smoothing=(label_smoothing, label_smoothing / columns), z_loss=z_loss,
        normalise=hidden.dtype == torch.float16,
    )  # fmt: skip
    tiles = {
        part: tile or problem.choose_tile("recompute", part)
        for part in row_parts(hidden.shape[0], lam.shape[0])
    }
    with on_device(hidden):
        _walk_slices(
            problem,
            terms,
            tiles,
            gradients,
            main_grad=main_grad if need_dweight else None,
            scratch_bytes=scratch_bytes,
        )
    for total in gradients[::3]:  # dhidden and dlow
        if terms.scale is not None:
            total.mul_(terms.scale)
    return tuple(gradient.to(hidden.dtype) for gradient in gradients)


def _walk_slices(
    problem: Problem,
    terms: GradientTerms,
    tiles: dict[RowPart, Tile],
    gradients: tuple[
        Tensor, ...
    ],  # float32 zeros (N, D), (V, D), (V,); (N, r), (V, r); (0,) where not needed
    *,
    main_grad: Tensor | None,
    scratch_bytes: int | None,
) -> None:
    """Fill the gradients slice by slice: the kernel writes dlogits, library products consume them."""
    dhidden, dweight, dbias, *low_rank = gradients
    num_rows, vocab_size = problem.hidden.shape[0], problem.weight.shape[0]
    block_v = max(tile.block_v for tile in tiles.values())
    itemsize = problem.hidden.element_size()
    width = choose_slice_width(num_rows, vocab_size, itemsize, block_v=block_v, scratch_bytes=scratch_bytes)
    scratch = problem.hidden.new_empty(num_rows, width)
    for start in range(0, vocab_size, width):
        columns = slice(start, min(start + width, vocab_size))
        part_problem, dlogits = problem.columns(columns), scratch[:, : columns.stop - start]
        for part, tile in tiles.items():
            _recompute_slice(part_problem, terms, part, dlogits, first_column=start, tile=tile)
        if dhidden.numel():
            add_product(dhidden, dlogits, part_problem.weight)
        if main_grad is not None:
            add_product(main_grad[columns], dlogits.T, problem.hidden, terms.scale)
        elif dweight.numel():
            write_product(dweight[columns], dlogits.T, problem.hidden, terms.scale)
        if dbias.numel():
            sums = dlogits.sum(dim=0, dtype=torch.float32)
            dbias[columns] = sums if terms.scale is None else sums * terms.scale
        if low_rank:
            _low_rank_products(part_problem, dlogits, low_rank, columns, scale=terms.scale)


def _low_rank_products(
    problem: Problem,  # up (V_s, r)
    dlogits: Tensor,  # (N, V_s)
    gradients: list[Tensor],  # dlow (N, r) float32, dup (V, r); (0,) where not needed
    columns: slice,
    *,
    scale: Tensor | None,
) -> None:
    dlow, dup = gradients
    assert problem.low is not None and problem.up is not None
    if dlow.numel():
        add_product(dlow, dlogits, problem.up[:, : dlow.shape[1]])
    if dup.numel():
        write_product(dup[columns], dlogits.T, problem.low[:, : dup.shape[1]], scale)
