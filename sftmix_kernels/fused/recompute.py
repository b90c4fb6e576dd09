"""Gradients by the ``recompute`` schedule: walk the vocabulary in slices, never more logits than one slice.

    P = softmax of A, B and X, recomputed as exp(z - lse); J = f'(affine) = s (1 - (z / cap)^2), or s without a cap
    m = (1 - e) c[y],  g = e / V sum_v c_v                  c class weights, 1 without them; e smoothing, z z-loss
    dA = a_c J_A ((m + g + 2 z lse_A) P_A - m 1[y_c] - e c / V),  dB = a_u J_B (the same of B and y_u)
    dX = b J_X (P_X - lam 1[y_c] - (1 - lam) 1[y_u])
    G_c = dA + lam dX,  G_u = dB + (1 - lam) dX          dlogits = (G_c; G_u), one slice (N, V_s)
    dhidden = sum over slices G W_slice (float32),  dweight_slice = G^T hidden,  dbias_slice = sum over rows G
    dlow = sum over slices G up_slice (float32),    dup_slice = G^T low          with low-rank factors

Numbers of rows, and what makes a row bear nothing: row_terms.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Gradients, Kept, Upstream, empty_gradients
from .configs import Tile, choose_slice_width
from .exponentials import capped, exp
from .products import add_product, write_product
from .row_terms import GradientTerms
from .rows import living_terms
from .tiles import (
    CHANGING,
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
    refuse_cpu,
    row_parts,
    tile_coordinates,
    with_bias,
)
from .tokens import store_at_tokens


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
def _scaled_softmax(
    z, slope, terms, stride_terms, offs_v, vocab_size, class_weight, SMOOTHED: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """(factor * exp(z - lse) - uniform) * slope.

    terms: pointers to each row's lse, then its factor of exp(z - lse); in the fourth plane what smoothing subtracts,
    times class weights where there are any, in the fifth what z - lse adds to the factor.
    """
    down = z - tl.load(terms)[:, None]
    g = exp(down)
    factor = tl.load(terms + stride_terms)[:, None]
    if ENTROPY:
        factor += tl.load(terms + 4 * stride_terms)[:, None] * tl.where(g > 0.0, down, 0.0)
    g *= factor
    if SMOOTHED:
        uniform = tl.load(terms + 3 * stride_terms)[:, None]
        if class_weight is not None:
            uniform *= tl.load(class_weight + offs_v, mask=offs_v < vocab_size, other=0.0)[None, :]
        g -= uniform
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


@triton.jit(
    do_not_specialize=CHANGING,
    do_not_specialize_on_alignment=("target_c", "target_u", "row_terms_c", "row_terms_u"),
)
def _sftmix_recompute_kernel(
    hidden_c,  # (rows, D) pointer or descriptor
    hidden_u,  # (rows, D)
    weight,  # (V_s, D) the slice's rows
    bias,  # (V_s,) or None
    class_weight,  # (V_s,) float32 or None
    target_c,  # (rows,) int64
    target_u,  # (rows,)
    row_terms_c,  # (3 to 5, N) from the confident rows
    row_terms_u,  # (3 to 5, N) from the partners
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
    ENTROPY: tl.constexpr,
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
    offs_v = first_v + tl.arange(0, BLOCK_V)
    if PAIRED:
        y_u = load_target(target_u, rows, rows < num_rows, first_column, vocab_size) - first_v
        hit_u = any_inside(y_u, BLOCK_V)
        share = tl.load(pair_terms + 4 * num_rows + rows)
        x = share[:, None] * a + (1.0 - share)[:, None] * b
        z, slope = _logits_and_slope(x, bias, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT)
        g_x = _scaled_softmax(
            z, slope, pair_terms + rows, num_rows, offs_v, vocab_size, None, False, False
        )  # fmt: skip
        g_x = _at_target(g_x, slope, pair_terms + 2 * num_rows + rows, y_c, hit_c)
        g_x = _at_target(g_x, slope, pair_terms + 3 * num_rows + rows, y_u, hit_u)
        z, slope = _logits_and_slope(b, bias, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT)
        g_u = _scaled_softmax(
            z, slope, row_terms_u + rows, stride_terms, offs_v, vocab_size, class_weight, SMOOTHED, ENTROPY
        )  # fmt: skip
        g_u = _at_target(g_u, slope, row_terms_u + 2 * stride_terms + rows, y_u, hit_u)
        g_u += (1.0 - share)[:, None] * g_x
        _store_tile(dlogits_u, g_u, first_n, first_v, num_rows, vocab_size, stride_on, STORE_DESCRIPTORS)
    z, slope = _logits_and_slope(a, bias, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT)
    g_c = _scaled_softmax(
        z, slope, row_terms_c + rows, stride_terms, offs_v, vocab_size, class_weight, SMOOTHED, ENTROPY
    )  # fmt: skip
    g_c = _at_target(g_c, slope, row_terms_c + 2 * stride_terms + rows, y_c, hit_c)
    if PAIRED:
        g_c += share[:, None] * g_x
    _store_tile(dlogits_c, g_c, first_n, first_v, num_rows, vocab_size, stride_on, STORE_DESCRIPTORS)


def _recompute_slice(
    problem: Problem,  # weight (V_s, D), bias (V_s,)
    terms: GradientTerms,
    part: RowPart,
    dlogits: Tensor,  # (N, V_s)
    *,
    first_column: int,
    smoothed: bool,
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
        SMOOTHED=smoothed,
        ENTROPY=terms.rows.shape[0] == 5,
        STORE_DESCRIPTORS=store_descriptors,
    )


def fused_backward(
    call: Call,
    column: Tensor,  # (N,) targets among these columns, -1 at ignored rows and where they are elsewhere
    kept: Kept,
    upstream: Upstream,
    *,
    tile: Tile | None = None,
) -> Gradients:
    """Gradients from the upstream and what a forward kept of all columns; no host synchronisation.

    In the inputs' dtypes, those of hidden and low of a shard in float32: their sum over shards is to be rounded once.
    With ``call.main_grad`` dweight is added there, a slice at a time and unrounded, and none is made.

    ``scratch_bytes`` bounds the dlogits slice (N, V_s), at least one tile of columns; 0 sizes it for the L2 cache.
    Sums are float32 throughout. ``tile`` forces the launch shape (tests).

    Memory above inputs and gradients: N V_s itemsize, a copy of hidden N D itemsize, O(N + M) of statistics and, with
    16-bit inputs, a float32 dhidden 4 N D; float16 adds a float32 product 4 V_s D, tokens what tokens.py says twice.
    Off GPUs of capability 8.0, which have no 16-bit product with a float32 result, copies of one product's operands:
    4 (N V_s + max(N, V_s) D).

    Raises ValueError on CPU tensors outside the interpreter.
    """
    needs, num_rows = call.needs, call.sizes[0]
    refuse_cpu(call.hidden.device)
    found = _empty(call)
    if num_rows == 0:
        return Gradients(*(each.zero_().to(call.hidden.dtype) for each in found))
    call, terms = living_terms(call, column, kept, upstream)
    problem = Problem.of(call, column)
    tiles = {
        part: tile or problem.choose_tile("recompute", part) for part in row_parts(num_rows, call.sizes[2])
    }
    with on_device(call.hidden.device):
        _walk_slices(
            problem, terms, tiles, found, main_grad=call.main_grad if needs.dweight else None,
            smoothed=call.options.label_smoothing != 0, scratch_bytes=call.wanted.scratch_bytes or None,
        )  # fmt: skip
    for total in (found.dhidden, found.dlow):
        if terms.scale is not None:
            total.mul_(terms.scale)
    dtype, is_shard = call.hidden.dtype, call.place is not None
    del call, problem  # and the copy of hidden, before a rounded dhidden is made beside the float32 one
    return found if is_shard else Gradients(*(each.to(dtype) for each in found))


def _empty(call: Call) -> Gradients:
    """Buffers for the gradients, those of rows, which are summed over slices, zeros in float32."""
    needs = call.needs

    def zeros(like: Tensor | None, needed: bool) -> Tensor:
        shape = like.shape if needed and like is not None else (0,)
        return torch.zeros(shape, dtype=torch.float32, device=call.hidden.device)

    of_layer = call._replace(plan=list(call.wanted._replace(dhidden=0, dlow=0)))
    return empty_gradients(of_layer)._replace(
        dhidden=zeros(call.hidden, needs.dhidden), dlow=zeros(call.low, needs.dlow)
    )


def _walk_slices(
    problem: Problem,
    terms: GradientTerms,
    tiles: dict[RowPart, Tile],
    gradients: Gradients,  # dhidden and dlow zeros in float32
    *,
    main_grad: Tensor | None,
    smoothed: bool,
    scratch_bytes: int | None,
) -> None:
    """Fill the gradients slice by slice: the kernel writes dlogits, library products consume them."""
    dhidden, dweight, dbias, dlow, dup = gradients
    num_rows, vocab_size = problem.hidden.shape[0], problem.weight.shape[0]
    block_v = max(tile.block_v for tile in tiles.values())
    itemsize = problem.hidden.element_size()
    width = choose_slice_width(num_rows, vocab_size, itemsize, block_v=block_v, scratch_bytes=scratch_bytes)
    scratch = problem.hidden.new_empty(num_rows, width)
    for start in range(0, vocab_size, width):
        columns = slice(start, min(start + width, vocab_size))
        part_problem, dlogits = problem.columns(columns), scratch[:, : columns.stop - start]
        for part, tile in tiles.items():
            _recompute_slice(
                part_problem, terms, part, dlogits, first_column=start, smoothed=smoothed, tile=tile
            )
        if terms.tokens is not None and terms.at_tokens is not None:
            store_at_tokens(dlogits, terms.tokens, terms.at_tokens, start)
        if dhidden.numel():
            add_product(dhidden, dlogits, part_problem.weight)
        if main_grad is not None:
            add_product(main_grad[columns], dlogits.T, problem.hidden, terms.scale)
        elif dweight.numel():
            write_product(dweight[columns], dlogits.T, problem.hidden, terms.scale)
        if dbias.numel():
            total = dlogits.sum(dim=0, dtype=torch.float32)
            dbias[columns] = total if terms.scale is None else total * terms.scale
        if dlow.numel() and part_problem.up is not None:
            add_product(dlow, dlogits, part_problem.up[:, : dlow.shape[1]])
        if dup.numel() and problem.low is not None:
            write_product(dup[columns], dlogits.T, problem.low[:, : dup.shape[1]], terms.scale)
