"""Whether the loss is right on this machine: values and gradients against the specification, by its contract.

Three results of a small problem: ``truth`` is the reference in float64, ``torch`` the reference in the data type,
``ours`` the implementation. For each result, in the root mean square and in the maximum,

    error(ours) <= 2 error(torch) + one rounding of the result's type

both taken over several problems, because one draw of roundings may be small by luck. ``share`` is left over right.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import sftmix_loss, token_stats
from .findings import first_line

PAIRS, ROWS, VOCAB, WIDTH = 40, 101, 1003, 96
DRAWS = 3
SECONDS = 10.0  # after which no further case is begun
SMALL_SCRATCH = 2**17  # bytes: several chunks, slices and a ragged last one
PLAIN: dict[str, Any] = {"upstream": 1.0}
# Everything that changes the kernels' inner loop, and an upstream gradient that is not 1.
FULL: dict[str, Any] = {
    "upstream": 1.5, "softcap": 15.0, "logit_scale": 0.8, "label_smoothing": 0.1, "z_loss": 1e-3,
    "scratch_bytes": SMALL_SCRATCH,
}  # fmt: skip


class Way(NamedTuple):
    """An implementation and its schedule, as arguments of the loss."""

    impl: str
    schedule: str | None = None

    def __str__(self) -> str:
        return f"{self.impl} {self.schedule}" if self.schedule else self.impl


class Check(NamedTuple):
    """How one way did in one data type: the largest error as a share of what is allowed, and of which result."""

    way: Way
    dtype: torch.dtype
    share: float
    result: str
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return self.share <= 1 and not self.problem


def check_loss(
    ways: dict[torch.dtype, list[Way]], device: torch.device | str, *, seconds: float = SECONDS
) -> Iterator[Check]:
    """Each way in each data type, first without options, then with all; begins none once ``seconds`` are over."""
    started = time.perf_counter()
    for options in (PLAIN, FULL):
        for dtype, each in ways.items():
            for way in each:
                if time.perf_counter() - started > seconds:
                    return
                yield check_way(way, dtype, device, options)


def check_way(way: Way, dtype: torch.dtype, device: torch.device | str, options: dict[str, Any]) -> Check:
    """One way in one data type, over a few problems."""
    sizes: dict[str, list[Tensor]] = {}
    try:
        for seed in range(DRAWS):
            torchs, truth = _expected(seed, dtype, options is FULL)
            # Threads have orders of their own, so one draw has them all; on a busy machine each waits for the others.
            with _threads(torch.get_num_threads() if seed == 0 else 1):
                ours = _results(seed, dtype, options, way=way, device=device)
            for name, true in truth.items():
                sizes.setdefault(name, []).append(_sizes(ours[name], torchs[name], true))
    except (
        Exception
    ) as problem:  # whatever a driver, compiler or library raises is what the doctor is asked for
        return Check(way, dtype, float("inf"), "", first_line(problem))
    shares = {name: _share(torch.stack(found), _eps(name, dtype)) for name, found in sizes.items()}
    worst = max(shares, key=lambda name: shares[name])
    return Check(way, dtype, shares[worst], worst)


def _eps(name: str, dtype: torch.dtype) -> float:
    """One rounding of a result: gradients have the inputs' type, values float32."""
    return torch.finfo(dtype if name.startswith("d") else torch.float32).eps


def _sizes(ours: Tensor, torchs: Tensor, truth: Tensor) -> Tensor:
    """[kind, what]: root mean square and maximum of our error, of torch's, and of the value."""
    if ours.shape != truth.shape:
        raise ValueError(f"result: expected shape {list(truth.shape)}, got {list(ours.shape)}")
    each = torch.stack([(ours.double() - truth).flatten(), torchs.flatten(), truth.flatten()])
    return torch.stack([each.square().mean(dim=1).sqrt(), each.abs().amax(dim=1)])


def _share(sizes: Tensor, eps: float) -> float:
    """The larger of both kinds' error over what is allowed, from [draw, kind, what]; infinite for NaN."""
    error, torchs, value = sizes.square().mean(dim=0).sqrt().unbind(dim=1)
    share = torch.where(error == 0, error, error / (2 * torchs + eps * value)).max()
    return float("inf") if share.isnan() else float(share)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """This many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _expected(seed: int, dtype: torch.dtype, full: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Errors of torch in ``dtype``, and the truth; both on the CPU.

    The loss is one number, and torch's error in it may be near 0 by luck: it is taken to be at least what the errors
    of its rows give for a mean of independent ones.
    """
    options, reference = FULL if full else PLAIN, Way("reference")
    with _threads(1):
        truth = _results(seed, dtype, options, way=reference, compute=torch.float64)
        found = _results(seed, dtype, options, way=reference)
    errors = {name: found[name].double() - true for name, true in truth.items()}
    rows, values = (torch.cat([t["nll"], t["mixup_nll"]]) for t in (errors, truth))
    usual = truth["loss"].abs() * rows.norm() / values.norm() / len(rows) ** 0.5
    errors["loss"] = torch.maximum(errors["loss"].abs(), usual)
    return errors, truth


def _results(
    seed: int, dtype: torch.dtype, options: dict[str, Any], *, way: Way, device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Values and gradients on the CPU, by inputs of ``dtype`` held in ``compute``."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, std: float = 1.0) -> Tensor:
        drawn = (std * torch.randn(*shape, generator=g)).to(dtype)
        return drawn.to(device, compute or dtype).requires_grad_()

    hidden, weight, bias = leaf(ROWS, WIDTH), leaf(VOCAB, WIDTH, std=2 / WIDTH**0.5), leaf(VOCAB)
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    target[[3, PAIRS + 5, ROWS - 1]] = -100
    target, lam = target.to(device), torch.rand(PAIRS, generator=g).to(device)
    options = dict(options)
    upstream = options.pop("upstream")
    leaves = {"dhidden": hidden, "dweight": weight}
    if "softcap" in options:
        leaves["dbias"] = bias
        options["bias"] = bias
    out = sftmix_loss(hidden, weight, target, lam, impl=way.impl, schedule=way.schedule, **options)
    out.loss.backward(torch.full_like(out.loss, upstream))
    shared = {name: options[name] for name in ("bias", "softcap", "logit_scale") if name in options}
    stats = token_stats(hidden, weight, target, impl=way.impl, **shared)
    results = {"loss": out.loss, "nll": out.nll, "lse": out.lse, "mixup_nll": out.mixup_nll}
    results["entropy"] = stats.entropy
    results.update({name: t.grad for name, t in leaves.items() if t.grad is not None})
    return {name: t.detach().cpu() for name, t in results.items()}
