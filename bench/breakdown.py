"""Where one call's time goes, by operator: ``python -m bench.breakdown --shapes 1024x49152x576 --dtype float32``.

Self times of torch's profiler, summed over a call of loss and backward, median over ``--rounds`` calls; on a CPU these
are seconds of one thread that other threads may share, on a GPU (``--device cuda``) those of its kernels. ``products``
are matrix products; the rest is what a fused kernel would save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bench.machine import device_name, versions
from bench.problem import Problem
from bench.providers import choose
from bench.shapes import parse_shapes

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
# What the libraries call a matrix product's kernel on a GPU.
PRODUCT_KERNELS = ("gemm", "nvjet", "cutlass", "xmma", "splitK")


def is_product(name: str, device: str) -> bool:
    return name in PRODUCTS if device == "cpu" else any(part in name for part in PRODUCT_KERNELS)


def one_call(call: Callable[[], object], device: str = "cpu") -> dict[str, float]:
    """Milliseconds of self time by operator, on a GPU by kernel."""
    found: dict[str, float] = defaultdict(float)
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
        for event in trace.key_averages():
            found[event.key] += event.self_cpu_time_total / 1e3
        return found
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    for event in trace.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.key] += event.self_device_time_total / 1e3
    return found


def breakdown(call: Callable[[], object], rounds: int, device: str = "cpu") -> list[tuple[str, float]]:
    """(operator, median ms), largest first; products and everything else come first as sums."""
    call()
    samples = [one_call(call, device) for _ in range(rounds)]
    names = {name for sample in samples for name in sample}
    medians = {name: statistics.median(sample.get(name, 0.0) for sample in samples) for name in names}
    products = sum(ms for name, ms in medians.items() if is_product(name, device))
    rows = sorted(medians.items(), key=lambda row: -row[1])
    return [("products", products), ("everything else", sum(medians.values()) - products), *rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.breakdown", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="1024x49152x576")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--providers", default="ours:chunked")
    parser.add_argument("--task", default="sftmix", choices=("ntp", "sftmix"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, default=10, help="operators to print")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    print(f"{device_name(args.device)}; torch {versions()['torch']}; {torch.get_num_threads()} threads")
    for shape, _ in parse_shapes(args.shapes):
        problem = Problem(shape, args.dtype, args.device)
        for provider in choose(args.providers):
            loss = provider.build(problem, args.task)

            def call(problem: Problem = problem, loss: Callable[[], torch.Tensor] = loss) -> None:
                problem.clear_gradients()
                loss().backward()

            print(f"\n{provider.spec}, {args.task}, {shape}, {args.dtype} (ms)")
            for name, ms in breakdown(call, args.rounds, args.device)[: args.lines + 2]:
                print(f"{ms:10.3f}  {name[:100]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
