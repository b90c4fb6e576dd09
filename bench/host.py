"""What a call of ``fused`` costs beside the work: launches and Python time of one forward and backward, without a GPU.

    python -m bench.host            a table, and the same in bench/results/host.json; must run without TRITON_INTERPRET

Counted on meta tensors, for which the code chooses what it would on a GPU: kernels of ours, library products, and
every other operation that is a launch. Milliseconds are the least of many calls on tiny tensors of a CPU with the
launches of Triton kernels left out and values not looked at; they contain what torch's operations take there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.machine import ROOT, device_name
from bench.trace import PRODUCTS, Trace, recording

RESULTS = ROOT / "bench" / "results" / "host.json"
# Operations that launch nothing: they make or view memory, or ask for sizes.
NO_LAUNCH = (
    "empty new_empty empty_like empty_strided _unsafe_view alias as_strided detach expand permute select slice "
    "split squeeze t numpy_T transpose unbind unsqueeze view _reshape_alias lift_fresh unsafe_split "
    "split_with_sizes diagonal is_same_size set_"
).split()


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward."""

    case: str
    kernels: int
    products: int
    others: int
    ms: float

    @property
    def launches(self) -> int:
        """Beside the products."""
        return self.kernels + self.others


class _Launches(Trace):
    """Names of all operations, and of our kernels, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        at = len(self.names)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel()]
        is_new = func._schema.is_mutable or not all(any(t is each for each in given) for t in made)
        is_launch = (made and is_new) or name.startswith("_assert")
        if func.namespace == "aten" and name not in NO_LAUNCH and is_launch:
            self.names.insert(at, name)
        return out

    def launch(self, name: str, grid: Any, arguments: dict[str, Any]) -> None:
        self.names.append(name)


@contextmanager
def as_on_a_gpu(arch: str = "sm_90") -> Iterator[None]:
    """Tensors of a CPU take the way of a GPU's: kernels that are not interpreted, values that are not read."""
    from sftmix_kernels import checks, choice, operators
    from sftmix_kernels.fused import forward, rows, tiles

    patches = (
        (tiles, "INTERPRETED", True),
        (tiles, "current_arch", lambda _: arch),
        (forward, "_num_program_slots", lambda *_: 132),
        (checks, "readable", lambda _: False),
        (checks, "left_to_kernels", lambda *_, **__: True),
        (rows, "left_to_kernels", lambda *_, **__: True),
        (operators, "readable", lambda _: False),
        (choice, "why_not_fused", lambda *_: None),
    )
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(patch.object(where, name, value))
        yield


def _step(schedule: str, num_pairs: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Forward and backward of one chunk and of one slice: one pair, or one row."""
    from sftmix_kernels import linear_cross_entropy, sftmix_loss

    num_rows = 2 if num_pairs else 1
    hidden, weight = (torch.randn(n, 64, device=device).to(dtype).requires_grad_() for n in (num_rows, 512))
    target, lam = (
        torch.zeros(num_rows, dtype=torch.int64, device=device),
        torch.ones(num_pairs, device=device),
    )
    options: dict[str, Any] = {"impl": "fused", "schedule": schedule, "scratch_bytes": 2**30}

    def run() -> Tensor:
        if num_pairs:
            loss = sftmix_loss(hidden, weight, target, lam, **options).loss
        else:
            loss = linear_cross_entropy(hidden, weight, target, **options)
        loss.backward()
        hidden.grad = weight.grad = None
        return loss

    return run


def launches(schedule: str, num_pairs: int, dtype: torch.dtype) -> list[str]:
    """Names of all launches of one forward and backward, in their order; a kernel of ours has its own."""
    from sftmix_kernels.fused import products

    trace = _Launches()
    run = _step(schedule, num_pairs, dtype, "meta")
    with as_on_a_gpu(), patch.object(products, "multiplies_into_float32", lambda _: True):
        with recording(trace, launching=False), trace:
            run()
    return trace.names


def seconds(schedule: str, num_pairs: int, dtype: torch.dtype, rounds: int) -> float:
    """The least of ``rounds`` calls."""
    run, best = _step(schedule, num_pairs, dtype, "cpu"), float("inf")
    nothing = patch.object(Trace, "launch", lambda *_: None)
    ignored = patch.object(torch, "_assert_async", lambda *_: None)  # of a flag that no kernel has written
    with as_on_a_gpu(), recording(Trace(), launching=False), nothing, ignored:
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
    return best


def cost(schedule: str, num_pairs: int, dtype: torch.dtype, rounds: int = 300) -> tuple[Cost, list[str]]:
    names = launches(schedule, num_pairs, dtype)
    kernels = sum(name.startswith("_sftmix") for name in names)
    products = sum(name in PRODUCTS for name in names)
    case = f"{schedule}, {'pairs' if num_pairs else 'next-token'}, {str(dtype).removeprefix('torch.')}"
    ms = seconds(schedule, num_pairs, dtype, rounds) * 1e3
    return Cost(case, kernels, products, len(names) - kernels - products, ms), names


def cases() -> Iterator[tuple[str, int, torch.dtype]]:
    for schedule in ("recompute", "stored"):
        for num_pairs in (1, 0):
            yield schedule, num_pairs, torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", action="store_true", help="also what is launched, by name")
    arguments = parser.parse_args()
    found = []
    print(f"{'case':34} {'kernels':>7} {'products':>8} {'others':>6} {'ms':>6}")
    for schedule, num_pairs, dtype in cases():
        of_case, names = cost(schedule, num_pairs, dtype)
        found.append(of_case)
        print(
            f"{of_case.case:34} {of_case.kernels:7} {of_case.products:8} {of_case.others:6} {of_case.ms:6.2f}"
        )
        if arguments.names:
            print("   ", ", ".join(f"{n} {name}" for name, n in Counter(names).most_common()))
    about = {"device": device_name("cpu"), "torch": torch.__version__}
    rows = [asdict(of_case) for of_case in found]
    RESULTS.write_text(json.dumps({**about, "costs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
