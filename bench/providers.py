"""Every way to compute the measured losses: ours, torch's and the peers', each as a call without arguments.

The full SFTMix loss of the peers is composed from their next-token loss and two hard-label losses of the
mixed hidden states, weighted by lam and 1 - lam. Where a peer returns per-row losses the weights differ by
row ("row"); where it only returns a mean, one lam serves the whole batch ("batch"), which is less than SFTMix
asks but costs it no more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import BATCH_LAM, MIXUP_WEIGHT, Problem
from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats

Call = Callable[[], Any]


class HardLabelLoss(Protocol):
    """A peer's loss: hidden [N, D], weight [V, D], target [N] → scalar mean, or [N] with reduction "none"."""

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor: ...


@dataclass(frozen=True)
class Provider:
    """A named way to compute ``tasks``; ``missing`` says why it cannot run here, None where it can."""

    name: str
    schedule: str
    tasks: tuple[str, ...]
    build: Callable[[Problem, str], Call]  # (problem, task) → call
    missing: Callable[[str], str | None]  # device → reason
    lam: str = "row"

    @property
    def spec(self) -> str:
        """How ``--providers`` names it."""
        return f"{self.name}:{self.schedule}" if self.schedule else self.name


def anywhere(device: str) -> str | None:
    return None


def needs(package: str) -> Callable[[str], str | None]:
    """A peer's kernels: an NVIDIA GPU and the package."""

    def missing(device: str) -> str | None:
        if device != "cuda":
            return "needs a GPU"
        return None if find_spec(package) else f"{package} is not installed"

    return missing


def fused_missing(device: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        return None
    return (
        None
        if os.environ.get("TRITON_INTERPRET") == "1"
        else "needs a GPU, or TRITON_INTERPRET=1 at toy size"
    )


# ---- ours ----


def build_ours(problem: Problem, task: str, *, impl: str, schedule: str | None = None) -> Call:
    p = problem
    how: dict[str, Any] = {"impl": impl, "schedule": schedule}
    if task == "ntp":
        return lambda: linear_cross_entropy(p.hidden, p.weight, p.target, **how)
    if task == "stats":
        return lambda: token_stats(p.hidden, p.weight, p.target, impl=impl)
    if task == "planned":
        kept = p.kept_rows()
        target, lam = p.target[kept], p.lam[: len(kept) // 2]
        return lambda: (
            sftmix_loss(p.hidden[kept], p.weight, target, lam, mixup_weight=MIXUP_WEIGHT, **how).loss
        )
    return lambda: sftmix_loss(p.hidden, p.weight, p.target, p.lam, mixup_weight=MIXUP_WEIGHT, **how).loss


def build_reference_compiled(problem: Problem, task: str) -> Call:
    return torch.compile(build_ours(problem, task, impl="reference"), dynamic=False)


# ---- torch ----


def torch_ntp(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction=reduction)


def torch_sftmix(hidden: Tensor, weight: Tensor, target: Tensor, lam: Tensor) -> Tensor:
    """Logits once, mixed as logits: the fewest products that plain torch needs."""
    M = len(lam)
    logits = F.linear(hidden, weight).float()
    mixed = torch.lerp(logits[M:], logits[:M], lam[:, None])
    logprob = F.log_softmax(mixed, dim=1)
    at_c = logprob.gather(1, target[:M, None]).squeeze(1)
    at_u = logprob.gather(1, target[M:, None]).squeeze(1)
    return F.cross_entropy(logits, target) - MIXUP_WEIGHT * (lam * at_c + (1 - lam) * at_u).mean()


def torch_stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()
    lse = torch.logsumexp(logits, dim=1)
    logprobs = logits - lse[:, None]
    entropy = -(logprobs.exp() * logprobs).sum(dim=1)
    return logprobs.gather(1, target[:, None]).squeeze(1), lse, entropy, logits.argmax(dim=1) == target


def build_torch(problem: Problem, task: str, *, compiled: bool = False) -> Call:
    p = problem
    functions: dict[str, Callable[..., Any]] = {
        "ntp": torch_ntp,
        "sftmix": torch_sftmix,
        "stats": torch_stats,
    }
    function = torch.compile(functions[task], dynamic=False) if compiled else functions[task]
    return partial(function, p.hidden, p.weight, p.target, *([p.lam] if task == "sftmix" else []))


def build_gemm(problem: Problem, task: str, *, num_units: int) -> Call:
    """The bare library products that a loss of so many units performs: the ceiling."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()

    def call() -> Tensor:
        logits = torch.mm(hidden, weight.t())
        if num_units == 4:
            torch.mm(hidden, weight.t(), out=logits)
        if num_units >= 3:
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)
        return logits

    return call


# ---- hard-label losses of torch >= 2.13 and of the peers ----


def torch_linear_ce(
    hidden: Tensor, weight: Tensor, target: Tensor, reduction: str, *, chunked: bool
) -> Tensor:
    options: dict[str, Any] = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, **options)


def liger(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str, *, accum: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    sums = torch.float32 if accum == "float32" else None
    return liger_fused_linear_cross_entropy(hidden, weight, target, reduction=reduction, accum_dtype=sums)


def cce_exact(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """CCE without its gradient filter: ``impl="cce_exact"``, or in older releases ``filter_eps=None``."""
    import cut_cross_entropy

    loss = partial(cut_cross_entropy.linear_cross_entropy, hidden, weight, target, reduction=reduction)
    try:
        return loss(impl="cce_exact")
    except NotImplementedError:
        return loss(impl="cce", filter_eps=None)


def quack(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target, chunk_size=4096, reduction=reduction)


def build_composed(problem: Problem, task: str, *, loss: HardLabelLoss, lam: str = "row") -> Call:
    """NTP by one call of ``loss``; SFTMix by that and two calls on the mixed hidden states."""
    p, M = problem, problem.shape.M
    target_c, target_u = p.target[:M], p.target[M:]
    row_lam = p.lam_of("row")

    def sftmix() -> Tensor:
        share = row_lam[:, None] if lam == "row" else BATCH_LAM
        mixed = (share * p.hidden[:M] + (1 - share) * p.hidden[M:]).to(p.hidden.dtype)
        ntp = loss(p.hidden, p.weight, p.target, "mean")
        if lam == "batch":
            nll_c = loss(mixed, p.weight, target_c, "mean")
            nll_u = loss(mixed, p.weight, target_u, "mean")
            return ntp + MIXUP_WEIGHT * (BATCH_LAM * nll_c + (1 - BATCH_LAM) * nll_u)
        nll_c = loss(mixed, p.weight, target_c, "none")
        nll_u = loss(mixed, p.weight, target_u, "none")
        return ntp + MIXUP_WEIGHT * (row_lam * nll_c + (1 - row_lam) * nll_u).mean()

    return sftmix if task == "sftmix" else lambda: loss(p.hidden, p.weight, p.target, "mean")


LOSSES = ("ntp", "sftmix")
OURS = (*LOSSES, "stats", "planned")


def torch_linear_ce_missing(device: str) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "torch has linear_cross_entropy from 2.13 on"


def _composed(
    name: str, schedule: str, loss: Any, missing: Callable[[str], str | None], *,
    lam: str = "row", tasks: tuple[str, ...] = LOSSES,
) -> Provider:  # fmt: skip
    return Provider(name, schedule, tasks, partial(build_composed, loss=loss, lam=lam), missing, lam)


LIGER = partial(liger, accum="input")
PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "ours", "recompute", OURS, partial(build_ours, impl="fused", schedule="recompute"), fused_missing
    ),
    Provider(
        "ours",
        "stored",
        (*LOSSES, "planned"),
        partial(build_ours, impl="fused", schedule="stored"),
        fused_missing,
    ),
    Provider("ours", "chunked", (*LOSSES, "stats"), partial(build_ours, impl="chunked"), anywhere),
    Provider("ours", "reference", (*LOSSES, "stats"), partial(build_ours, impl="reference"), anywhere),
    Provider("torch", "eager", (*LOSSES, "stats"), build_torch, anywhere),
    Provider("torch", "1 GEMM", ("gemm",), partial(build_gemm, num_units=1), anywhere),
    Provider("torch", "3 GEMMs", ("gemm",), partial(build_gemm, num_units=3), anywhere),
    Provider("torch", "4 GEMMs", ("gemm",), partial(build_gemm, num_units=4), anywhere),
    _composed("quack", "chunked", quack, needs("quack"), lam="batch"),
    _composed("liger", "default", LIGER, needs("liger_kernel")),
    _composed("liger", "default", LIGER, needs("liger_kernel"), lam="batch", tasks=("sftmix",)),
    _composed("liger", "float32 sums", partial(liger, accum="float32"), needs("liger_kernel"), lam="batch"),
    _composed("cce_exact", "", cce_exact, needs("cut_cross_entropy")),
    _composed("torch_linear_ce", "plain", partial(torch_linear_ce, chunked=False), torch_linear_ce_missing),
    _composed("torch_linear_ce", "chunked", partial(torch_linear_ce, chunked=True), torch_linear_ce_missing),
    Provider("torch_compile", "plain", (*LOSSES, "stats"), partial(build_torch, compiled=True), anywhere),
    Provider("torch_compile", "reference", (*LOSSES, "stats"), build_reference_compiled, anywhere),
)


def choose(text: str | None) -> list[Provider]:
    """``ours,torch:eager`` → providers of these names (all schedules) or name:schedule; None: all.

    Raises ``ValueError`` for a name that matches nothing.
    """
    if text is None:
        return list(PROVIDERS)
    chosen: list[Provider] = []
    for item in text.split(","):
        matches = [provider for provider in PROVIDERS if item.strip() in (provider.name, provider.spec)]
        if not matches:
            known = ", ".join(dict.fromkeys(provider.spec for provider in PROVIDERS))
            raise ValueError(f"providers: expected {known}, got {item.strip()!r}")
        chosen += [provider for provider in matches if provider not in chosen]
    return chosen


def directions(provider: Provider, task: str) -> tuple[str, ...]:
    """Statistics have no backward; one bare product is a forward, three or four a forward and backward."""
    if task == "gemm":
        return ("fwd",) if provider.schedule == "1 GEMM" else ("fwd_bwd",)
    if task == "planned":
        return ("fwd_bwd",)
    return ("fwd",) if task == "stats" else ("fwd", "fwd_bwd")
