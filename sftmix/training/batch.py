"""From pairs of tokenized examples to one batch and its row plan.

The decoder sees all sequences of the batch at once: the confident ones, their partners in the same order,
then the unpaired ones, either right-padded [B, T] or packed: one after the other in a single row [1, T], whose
``starts`` say where they begin and whose ``position_ids`` begin anew with each. The head sees only
``hidden.flatten(0, 1)[rows]``: the row for token t of a sequence is that of the position before it, which predicts
it. Rows come in the order the loss asks for: the M mixed rows of the confident members, the M of their partners,
then all other supervised rows. Prompt and padding positions have no row. The plan is made here, on the CPU.

Weights follow the rows: a row's next-token term has its own token's weight, whether it is mixed or not. A
mixed position's target is lambda y_c + (1 - lambda) y_u, and its Mixup term has the weight
lambda w_c + (1 - lambda) w_u, the same mean of its two tokens' weights. The paper has no weights; this is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.data.tokenized import TokenizedExample

Lam = float | NDArray[np.floating]
PairItem = tuple[TokenizedExample, TokenizedExample | None, Lam]


@dataclass
class Batch:
    """One forward pass: B sequences, N supervised rows, of which the first 2M are mixed.

    Padded, T is the longest sequence's length; packed, it is the sum of all.
    """

    input_ids: Tensor  # [B, T] int64; packed: [1, T]
    attention_mask: Tensor | None  # [B, T] int64, 1 for tokens and 0 for padding; None: packed
    rows: Tensor  # [N] int64, indices into the flattened positions
    target: Tensor  # [N] int64, the token that each row predicts
    lam: Tensor  # [M] float32, weight of the confident member
    example: Tensor  # [N] int64, the sequence that each row belongs to
    ids: list[str]  # [B] example ids
    row_weight: Tensor | None = None  # [N] float32, of the rows' next-token terms; None: all 1
    pair_weight: Tensor | None = None  # [M] float32, of the pairs' Mixup terms; None: all 1
    position_ids: Tensor | None = None  # [1, T] int64, from 0 in each sequence; None: padded
    starts: tuple[int, ...] | None = (
        None  # [B + 1], where the sequences begin in the row, and T; None: padded
    )

    @property
    def num_supervised(self) -> int:
        """N, the number of supervised rows."""
        return self.rows.numel()

    @property
    def num_mixed(self) -> int:
        """M, the number of mixed positions."""
        return self.lam.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on ``device``."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=non_blocking)
        return Batch(**values)


def count_mixed(confident: TokenizedExample, unconfident: TokenizedExample | None) -> int:
    """The number of mixed positions of a pair: the shorter of the two responses, in supervised tokens."""
    return 0 if unconfident is None else min(confident.num_supervised, unconfident.num_supervised)


def pair_weights(
    confident: TokenizedExample, unconfident: TokenizedExample | None, lam: Lam
) -> NDArray[np.float32]:
    """lambda w_c + (1 - lambda) w_u at each of the pair's mixed positions, rounded to float32 once."""
    size = count_mixed(confident, unconfident)
    if unconfident is None or (confident.weights is None and unconfident.weights is None):
        return np.ones(size, dtype=np.float32)
    share = _spread(lam, size, confident.id).astype(np.float64)  # and with it all that it multiplies
    one, other = (_token_weights(member)[:size] for member in (confident, unconfident))
    return (share * one + (1 - share) * other).astype(np.float32)


def collate_pairs(pairs: Sequence[PairItem], *, pad_id: int, packed: bool = False) -> Batch:
    """Batch pairs of (confident, unconfident or ``None``, lambda) with their row plan, padded or ``packed``.

    Supervised tokens of a pair are aligned from the first, in order (across turns), and cut to the shorter
    of the two; what is left over trains unmixed. lambda is one number for the pair, or a 1-D array with one
    for each of its ``count_mixed`` positions; it is not read for an example without a partner.
    Raises ``ValueError`` for no pairs, for an example that its ``check`` refuses, and for a lambda outside
    [0, 1] or of the wrong length.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    whole = [(c, u, lam) for c, u, lam in pairs if u is not None]
    alone = [c for c, u, _ in pairs if u is None]
    sequences = [c for c, _, _ in whole] + [u for _, u, _ in whole] + alone
    for sequence in sequences:
        sequence.check()
    num_mixed = [count_mixed(c, u) for c, u, _ in whole]
    lams = [_spread(lam, size, c.id) for (c, _, lam), size in zip(whole, num_mixed, strict=True)]

    cuts = [*num_mixed, *num_mixed, *([0] * len(alone))]
    batch = _assemble(sequences, cuts, pad_id, packed)
    batch.lam = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *lams]))
    if any(sequence.weights is not None for sequence in sequences):
        batch.row_weight = _unless_ones(
            _mixed_first([_token_weights(sequence) for sequence in sequences], cuts)
        )
        batch.pair_weight = _unless_ones(
            np.concatenate([np.empty(0, np.float32), *(pair_weights(*pair) for pair in whole)])
        )
    return batch


def collate_plain(examples: Sequence[TokenizedExample], *, pad_id: int, packed: bool = False) -> Batch:
    """Batch examples for plain next-token prediction: every supervised token is a row and M = 0."""
    return collate_pairs([(example, None, 1.0) for example in examples], pad_id=pad_id, packed=packed)


def blank_batch(pad_id: int) -> Batch:
    """One short sequence without rows (N = 0): it keeps an idle process in the collective calls."""
    blank = TokenizedExample(id="", input_ids=(pad_id, pad_id), supervised=(False, False))
    return collate_plain([blank], pad_id=pad_id)


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Check a row plan on the CPU before it costs a forward pass.

    Raises ``ValueError`` for a token or target outside [0, ``vocab_size``), rows outside the batch or
    repeated, an odd row plan (2M > N, lengths that differ), a lambda outside [0, 1] or NaN, and a weight that
    is not positive and finite.
    """
    for name in ("input_ids", "target"):
        _check_range(name, getattr(batch, name), "V", vocab_size)
    num_rows, positions = batch.rows.numel(), batch.input_ids.numel()
    for name in ("target", "example"):
        if getattr(batch, name).numel() != num_rows:
            raise ValueError(f"{name}: expected [N={num_rows}], got [{getattr(batch, name).numel()}]")
    if 2 * batch.num_mixed > num_rows:
        raise ValueError(f"lam: expected at most N // 2 = {num_rows // 2} pairs, got {batch.num_mixed}")
    _check_range("rows", batch.rows, "B*T", positions)
    if num_rows and int(np.bincount(batch.rows.numpy()).max()) > 1:
        raise ValueError("rows: expected every position at most once, got one that is repeated")
    lam = batch.lam.numpy()
    if not ((lam >= 0) & (lam <= 1)).all():
        raise ValueError(f"lam: expected values in [0, 1], got {batch.lam.tolist()}")
    for name, sign, size in (("row_weight", "N", num_rows), ("pair_weight", "M", batch.num_mixed)):
        weight = getattr(batch, name)
        if weight is None:
            continue
        if weight.shape != (size,):
            raise ValueError(f"{name}: expected [{sign}={size}], got {list(weight.shape)}")
        if not bool(((weight > 0) & weight.isfinite()).all()):
            raise ValueError(f"{name}: expected positive finite values, got {weight.tolist()}")


def _check_range(name: str, values: Tensor, sign: str, size: int) -> None:
    """Raise ``ValueError`` for a value outside [0, ``size``)."""
    if not values.numel():
        return
    low, high = int(values.numpy().min()), int(values.numpy().max())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected values in [0, {sign}={size}), got {low} to {high}")


def _supervised_rows(sequence: TokenizedExample, start: int) -> NDArray[np.int64]:
    """The rows of the supervised tokens of a sequence whose first position is ``start``, in order."""
    return start + np.flatnonzero(np.asarray(sequence.supervised, dtype=bool)) - 1


def _token_weights(sequence: TokenizedExample) -> NDArray[np.float32]:
    """The weights of a sequence's supervised tokens, in order."""
    if sequence.weights is None:
        return np.ones(sequence.num_supervised, dtype=np.float32)
    return np.asarray(sequence.weights, dtype=np.float32)[np.asarray(sequence.supervised, dtype=bool)]


def _mixed_first(parts: Sequence[NDArray[Any]], cuts: Sequence[int]) -> NDArray[Any]:
    """Each sequence's values of its supervised tokens in the order of rows: those before the cuts, then the rest."""
    before = [part[:cut] for part, cut in zip(parts, cuts, strict=True)]
    return np.concatenate([*before, *(part[cut:] for part, cut in zip(parts, cuts, strict=True))])


def _unless_ones(weights: NDArray[np.float32]) -> Tensor | None:
    """None for weights that are all 1, so that the loss is computed as without any."""
    return None if bool((weights == 1).all()) else torch.from_numpy(weights)


def _spread(lam: Lam, size: int, name: str) -> NDArray[np.float32]:
    """A pair's lambda as float32 [size]."""
    values = np.asarray(lam, dtype=np.float32)
    if values.ndim == 0:
        values = np.full(size, values, dtype=np.float32)
    if values.shape != (size,):
        raise ValueError(
            f"lam: expected one number or [{size}] for the pair of {name}, got {list(values.shape)}"
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"lam: expected values in [0, 1] for the pair of {name}, got {lam}")
    return values


def _assemble(sequences: Sequence[TokenizedExample], cuts: Sequence[int], pad_id: int, packed: bool) -> Batch:
    """The batch but for its lambdas and weights; ``cuts``: how many of each sequence's rows are mixed."""
    lengths = [len(sequence.input_ids) for sequence in sequences]
    shape = (1, sum(lengths)) if packed else (len(sequences), max(lengths))
    starts = np.cumsum([0, *lengths]) if packed else np.arange(len(sequences) + 1) * shape[1]
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    is_token, position = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for sequence, start, length in zip(sequences, starts.tolist(), lengths, strict=False):
        here = slice(start, start + length)
        input_ids.reshape(-1)[here] = sequence.input_ids
        is_token.reshape(-1)[here] = 1
        position.reshape(-1)[here] = np.arange(length)
    plans = [_supervised_rows(*each) for each in zip(sequences, starts.tolist(), strict=False)]
    rows = _mixed_first(plans, cuts)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if packed else torch.from_numpy(is_token),
        rows=torch.from_numpy(rows),
        target=torch.from_numpy(_targets(sequences, starts, input_ids)[rows + 1]),
        lam=torch.empty(0),
        example=torch.from_numpy(np.searchsorted(starts, rows, side="right") - 1),
        ids=[sequence.id for sequence in sequences],
        position_ids=torch.from_numpy(position) if packed else None,
        starts=tuple(starts.tolist()) if packed else None,
    )


def _targets(
    sequences: Sequence[TokenizedExample], starts: NDArray[np.int64], input_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The token trained at each flattened position: the one that stands there, unless another one replaces it."""
    if not any(sequence.replaced for sequence in sequences):
        return input_ids.reshape(-1)
    targets = input_ids.reshape(-1).copy()
    for sequence, start in zip(sequences, starts, strict=False):
        for token, target in sequence.replaced:
            targets[start + token] = target
    return targets
