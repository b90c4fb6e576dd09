"""What every kernel shares: the one main loop of a logits tile, the order of tiles, and the loading of operands.

    logits = f(W h + b),  f(a) = cap tanh(s a / cap)  or  s a without a cap;  W h + up low with low-rank factors
    x      = f(lam A + (1 - lam) B + b)               A = W h_c,  B = W h_u

A tile is BLOCK_N pairs (or rows) by BLOCK_V columns; its two accumulators share each load of the weight. Row offsets
are 64-bit. Through pointers, rows and columns past the end repeat the last one (results are masked where they are
stored), so that the main loop needs no mask but the one at the end of D, on both operands.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..call import Call
from .configs import INTERPRETED, Tile, choose_rank_block, choose_row_block, choose_tile, current_arch

# What differs from step to step, with N, M and the number of splits. Triton compiles a kernel anew where an integer
# becomes 1 or divisible by 16; no load or store of several elements at a time rests on these.
CHANGING = (
    "num_rows", "num_pairs", "num_mixed", "num_blocks_n", "num_splits", "tiles_per_split", "first_row", "chunk_rows",
    "first_column", "num_columns", "num_tokens", "stride_carry", "stride_terms",
)  # fmt: skip


@triton.jit
def tile_coordinates(num_blocks_n, num_blocks_v, GROUP_N: tl.constexpr):
    """(row block, vocabulary block) of this program: GROUP_N row blocks walk the vocabulary side by side."""
    pid = tl.program_id(0).to(tl.int64)
    per_group = GROUP_N * num_blocks_v
    first_n = (pid // per_group) * GROUP_N
    group_size = tl.minimum(num_blocks_n - first_n, GROUP_N)
    within = pid % per_group
    return first_n + within % group_size, within // group_size


@triton.jit
def logits_tile(
    hidden_c,  # (rows, D) pointer or descriptor: the confident rows, or all rows when not PAIRED
    hidden_u,  # (rows, D) their partners
    weight,  # (V, D) pointer or descriptor
    first_n,  # int64
    first_v,  # int32
    num_rows,
    vocab_size,
    hidden_size,
    stride_hn,
    stride_wv,
    PAIRED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A = h_c W^T and B = h_u W^T of one tile, float32, without bias."""
    # Without it a loop that may not run at all makes triton 3.6 serialise wgmma with 8 warps (ptxas: C7515).
    tl.assume(hidden_size > 0)
    acc_c = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    acc_u = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    if USE_DESCRIPTORS:
        row = first_n.to(tl.int32)
        for d in range(0, hidden_size, BLOCK_D):
            w = weight.load([first_v, d]).T
            acc_c = tl.dot(hidden_c.load([row, d]), w, acc_c, input_precision=PRECISION)
            if PAIRED:
                acc_u = tl.dot(hidden_u.load([row, d]), w, acc_u, input_precision=PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        offs_n = tl.minimum(first_n + tl.arange(0, BLOCK_N), num_rows - 1)
        offs_v = tl.minimum(first_v + tl.arange(0, BLOCK_V), vocab_size - 1).to(tl.int64)
        offs_h = offs_n[:, None] * stride_hn + offs_d[None, :]
        ptrs_c = hidden_c + offs_h
        ptrs_u = hidden_u + offs_h
        ptrs_w = weight + offs_v[None, :] * stride_wv + offs_d[:, None]
        for d in range(0, hidden_size, BLOCK_D):
            w = _load_along_d(ptrs_w, offs_d[:, None], hidden_size - d, EVEN_D)
            c = _load_along_d(ptrs_c, offs_d[None, :], hidden_size - d, EVEN_D)
            acc_c = tl.dot(c, w, acc_c, input_precision=PRECISION)
            if PAIRED:
                u = _load_along_d(ptrs_u, offs_d[None, :], hidden_size - d, EVEN_D)
                acc_u = tl.dot(u, w, acc_u, input_precision=PRECISION)
                ptrs_u += BLOCK_D
            ptrs_c += BLOCK_D
            ptrs_w += BLOCK_D
    return acc_c, acc_u


@triton.jit
def _load_along_d(ptrs, offs_d, remaining, EVEN_D: tl.constexpr):
    if EVEN_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=offs_d < remaining, other=0.0)


@triton.jit
def add_low_rank(
    acc_c,  # (BLOCK_N, BLOCK_V) float32
    acc_u,
    low_c,  # (rows, r)
    low_u,  # (rows, r) the partners'
    up,  # (V, r)
    first_n,  # int64
    first_v,  # int32
    num_rows,
    vocab_size,
    rank,
    stride_ln,
    stride_uv,
    PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A + low_c up^T and B + low_u up^T of one tile: a second, short loop over the rank."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_n = tl.minimum(first_n + tl.arange(0, acc_c.shape[0]), num_rows - 1)
    offs_v = tl.minimum(first_v + tl.arange(0, acc_c.shape[1]), vocab_size - 1).to(tl.int64)
    offs_l = offs_n[:, None] * stride_ln + offs_r[None, :]
    ptrs_up = up + offs_v[None, :] * stride_uv + offs_r[:, None]
    for r in range(0, rank, BLOCK_R):
        w = _load_along_d(ptrs_up + r, offs_r[:, None], rank - r, False)
        c = _load_along_d(low_c + offs_l + r, offs_r[None, :], rank - r, False)
        acc_c = tl.dot(c, w, acc_c, input_precision=PRECISION)
        if PAIRED:
            u = _load_along_d(low_u + offs_l + r, offs_r[None, :], rank - r, False)
            acc_u = tl.dot(u, w, acc_u, input_precision=PRECISION)
    return acc_c, acc_u


@triton.jit
def with_bias(affine, bias, offs_v, vocab_size):
    """affine (rows, columns) plus the bias of its columns offs_v; bias may be None."""
    if bias is None:
        return affine
    else:
        return affine + tl.load(bias + offs_v, mask=offs_v < vocab_size, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_target(target, rows, mask, first_column, num_columns):
    """Targets as int32 columns of the stretch that starts at first_column; -1 where they lie outside, or none is."""
    y = tl.load(target + rows, mask=mask, other=-1) - first_column
    return tl.where((y >= 0) & (y < num_columns), y, -1).to(tl.int32)


@triton.jit
def column_inside(y, first_v, BLOCK_V: tl.constexpr):
    """Columns of the tile that starts at first_v, from columns y of what it is a tile of; -1 where outside."""
    return tl.where((y >= first_v) & (y < first_v + BLOCK_V), y - first_v, -1)


@triton.jit
def _or(one, other):
    return one | other


@triton.jit
def any_bit(bits):
    """All rows' bits (rows,) in one scalar, so that a tile without any skips what they stand for."""
    return tl.reduce(bits, 0, _or)


@triton.jit
def any_inside(column, BLOCK_V: tl.constexpr):
    """Whether any row's column is in this tile: one scalar, so that the other tiles skip what targets need."""
    return tl.max(((column >= 0) & (column < BLOCK_V)).to(tl.int32), axis=0) > 0


class RowPart(NamedTuple):
    """A run of rows that one launch serves: ``size`` pairs from row 0, or ``size`` plain rows from ``start``."""

    start: int
    size: int
    paired: bool

    @property
    def num_rows(self) -> int:
        return 2 * self.size if self.paired else self.size

    @property
    def num_mixed(self) -> int:
        return self.size if self.paired else 0

    @property
    def rows(self) -> slice:
        """All rows of the part, partners included."""
        return slice(self.start, self.start + self.num_rows)

    @property
    def first(self) -> slice:
        """The confident rows of pairs; plain rows all."""
        return slice(self.start, self.start + self.size)

    @property
    def second(self) -> slice:
        """The partners; of plain rows, which have none, the rows themselves: a pointer that is not read."""
        return slice(self.size, 2 * self.size) if self.paired else self.first


def row_parts(num_rows: int, num_pairs: int) -> list[RowPart]:
    """Pairs first, then the rows beside them."""
    pairs = RowPart(0, num_pairs, True)
    plain = RowPart(2 * num_pairs, num_rows - 2 * num_pairs, False)
    return [part for part in (pairs, plain) if part.size]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def refuse_cpu(device: torch.device) -> None:
    """Raises ValueError where Triton cannot run on ``device``."""
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "impl: expected 'chunked' or 'reference' for tensors on the CPU, got 'fused' "
            "(set TRITON_INTERPRET=1 before the import to run its kernels in Triton's interpreter)"
        )


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself when its last dimension is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_block(vocab_size: int, device: torch.device) -> int:
    """Columns of one block of the stored schedule's kernel."""
    return choose_row_block(vocab_size, current_arch(device))


def _whole_steps(factor: Tensor) -> Tensor:
    """A low-rank factor with zeros up to a multiple of 16 columns: at r = 20 masked loads take 390 bytes of stack."""
    spare = -factor.shape[1] % 16
    return unit_stride(factor) if spare == 0 else torch.nn.functional.pad(factor, (0, spare))


def dot_precision(dtype: torch.dtype) -> str:
    """``ieee``, or ``tf32`` where torch's own float32 products may use it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def can_describe(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can address ``tensor`` [rows, columns]: 16-byte base and row stride."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    return aligned and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def operand(tensor: Tensor, block: tuple[int, int], use_descriptors: bool) -> Any:
    """What a kernel receives for ``tensor``: a descriptor of ``block``, or the tensor itself, a pointer."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if use_descriptors else tensor


class Problem(NamedTuple):
    """The tensors and numbers that every launch needs, laid out as the kernels want them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)
    softcap: float
    logit_scale: float
    low: Tensor | None = None  # (N, r), zeros up to a multiple of 16 columns
    up: Tensor | None = None  # (V, r)
    class_weight: Tensor | None = None  # (V,) float32, with label smoothing alone: it weighs columns

    @classmethod
    def of(cls, call: Call, column: Tensor) -> Problem:
        """Raises ValueError where Triton cannot run on the call's device."""
        refuse_cpu(call.hidden.device)
        options = call.options
        bias = None if call.bias is None else call.bias.contiguous()
        low, up = (None if factor is None else _whole_steps(factor) for factor in (call.low, call.up))
        return cls(
            unit_stride(call.hidden), unit_stride(call.weight), column.contiguous(), bias, options.softcap,
            options.logit_scale, low, up, call.column_weight if options.label_smoothing else None,
        )  # fmt: skip

    def columns(self, columns: slice) -> Problem:
        """The same with a slice of the vocabulary; targets still count from the vocabulary's start."""
        beside = (self.bias, self.up, self.class_weight)
        bias, up, class_weight = (None if t is None else t[columns] for t in beside)
        return self._replace(weight=self.weight[columns], bias=bias, up=up, class_weight=class_weight)

    def choose_tile(self, operation: str, part: RowPart, *, predicted: bool = False) -> Tile:
        return choose_tile(
            operation, num_rows=part.size, vocab_size=self.weight.shape[0], hidden_size=self.weight.shape[1],
            dtype=self.hidden.dtype, arch=current_arch(self.hidden.device), paired=part.paired,
            softcap=self.softcap != 0.0, bias=self.bias is not None,
            columns=predicted or self.class_weight is not None,
        )  # fmt: skip


def _low_rank_arguments(problem: Problem, part: RowPart) -> dict[str, Any]:
    """The second operand of the logits; without it all are None, and the kernels are those without it."""
    low, up = problem.low, problem.up
    if low is None or up is None:
        return dict.fromkeys(("low_c", "low_u", "up", "rank", "stride_ln", "stride_uv", "BLOCK_R"))
    return {
        "low_c": low[part.first],
        "low_u": low[part.second],
        "up": up,
        "rank": up.shape[1],
        "stride_ln": low.stride(0),
        "stride_uv": up.stride(0),
        "BLOCK_R": choose_rank_block(up.shape[1]),
    }


def launch_arguments(problem: Problem, part: RowPart, tile: Tile) -> dict[str, Any]:
    """The keyword arguments and launch options that both kernels share."""
    hidden, weight = problem.hidden, problem.weight
    rows_c, rows_u = hidden[part.first], hidden[part.second]
    use_descriptors = tile.use_descriptors and all(map(can_describe, (rows_c, rows_u, weight)))
    options = {} if tile.maxnreg is None else {"maxnreg": tile.maxnreg}
    return {
        "hidden_c": operand(rows_c, (tile.block_n, tile.block_d), use_descriptors),
        "hidden_u": operand(rows_u, (tile.block_n, tile.block_d), use_descriptors),
        "weight": operand(weight, (tile.block_v, tile.block_d), use_descriptors),
        **_low_rank_arguments(problem, part),
        "bias": problem.bias,
        "class_weight": problem.class_weight,
        "target_c": problem.target[part.first],
        "target_u": problem.target[part.second],
        "num_rows": part.size,
        "vocab_size": weight.shape[0],
        "hidden_size": weight.shape[1],
        "stride_hn": hidden.stride(0),
        "stride_wv": weight.stride(0),
        "num_blocks_n": triton.cdiv(part.size, tile.block_n),
        "SOFTCAP": problem.softcap,
        "LOGIT_SCALE": problem.logit_scale,
        "PAIRED": part.paired,
        "USE_DESCRIPTORS": use_descriptors,
        "EVEN_D": weight.shape[1] % tile.block_d == 0,
        "PRECISION": dot_precision(hidden.dtype),
        "EXACT": hidden.dtype == torch.float32,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_N": tile.group_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **options,
    }
