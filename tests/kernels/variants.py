"""How many variants of each kernel Triton would compile while N and M change from step to step, without a GPU.

    python -m tests.kernels.variants [--steps 200]      a JSON line per step; must run without TRITON_INTERPRET

The public functions run on tensors of a CPU with the launch replaced: what Triton would look a compiled kernel up by,
types, integers that are 1 or divisible by 16, the alignment of real addresses, is made by its own functions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sftmix_kernels import choice, linear_cross_entropy, sftmix_loss, token_stats
from sftmix_kernels.fused import forward, tiles
from tests.parity import Case, make_case

# V is no multiple of 16, so that the last slice of the vocabulary differs from the others.
VOCAB, HIDDEN = 1003, 64
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
Keys = dict[str, set[str]]


@contextmanager
def keys_of(arch: str) -> Iterator[Keys]:
    """The set of keys of each kernel that is launched inside; nothing is launched."""
    keys: Keys = defaultdict(set)
    binders: dict[str, Callable[..., Any]] = {}

    def record(kernel: JITFunction, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        name = kernel.__name__
        if name not in binders:
            binders[name] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, specialisation, options = binders[name](**arguments)
        keys[name].add(f"{specialisation} {options}")

    patches = (
        (JITFunction, "run", record),
        (tiles, "INTERPRETED", True),  # tensors of a CPU are not refused
        (choice, "_INTERPRETING", True),
        (tiles, "current_arch", lambda _: arch),
        (forward, "_num_program_slots", lambda *_: 132),
    )
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(patch.object(where, name, value))
        yield keys


def step(case: Case) -> None:
    """Both schedules, an upstream for each row, and statistics of given tokens; lam and targets at any address."""
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    for schedule in ("recompute", "stored"):
        loss = sftmix_loss(
            *leaves, case.target, case.lam, bias=case.bias, impl="fused", schedule=schedule, label_smoothing=0.1,
            scratch_bytes=2**18,
        ).loss  # fmt: skip
        torch.autograd.grad(loss, leaves)
    terms = linear_cross_entropy(*leaves, case.target, bias=case.bias, impl="fused", reduction="none")
    torch.autograd.grad(terms.sum(), leaves)
    found = token_stats(*leaves, case.target, tokens=case.target[:, None], differentiable=True, impl="fused")
    assert found.token_logprob is not None
    torch.autograd.grad(found.entropy.sum() + found.token_logprob.sum(), leaves)


def replay(steps: int, arch: str, dtype: torch.dtype, hidden_size: int) -> Iterator[dict[str, int]]:
    """After each step the number of keys of each kernel. N is 3 to 300, M anything that fits, none in some steps."""
    draw = random.Random(0)
    with keys_of(arch) as keys:
        for _ in range(steps):
            num_rows = draw.randint(3, 300)
            num_pairs = draw.choice((0, draw.randint(1, num_rows // 2), draw.randint(1, num_rows // 2)))
            step(make_case(num_rows, VOCAB, hidden_size, num_pairs=num_pairs, dtype=dtype))
            yield {name: len(found) for name, found in keys.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for counts in replay(arguments.steps, arguments.arch, torch.bfloat16, arguments.hidden):
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
