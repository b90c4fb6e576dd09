"""What test_exchange runs under torchrun: every rank with rows of its own, its results in a file."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sftmix_kernels import LossHead, linear_cross_entropy, sftmix_loss, token_stats
from sftmix_kernels.vocab_parallel import rows as rows_module
from tests.interpreter import prepare_the_interpreter
from tests.kernels.vocab_parallel_ranks import columns, message
from tests.kernels.watching import LargestTensor
from tests.parity import Case, make_case

V, D, R_LORA, SCALING = 37, 6, 3, 0.5


class Spread(NamedTuple):
    """Of each rank: rows, pairs among them, rows of the weight; and whose targets are all ignored."""

    num_rows: tuple[int, ...]
    num_pairs: tuple[int, ...]
    num_columns: tuple[int, ...]
    silent: tuple[int, ...] = ()


SPREADS: dict[int, dict[str, Spread]] = {
    2: {
        "ragged": Spread((9, 5), (3, 1), (26, 11)),
        "one without pairs, an empty shard": Spread((8, 7), (3, 0), (0, 37)),
        "one without rows": Spread((0, 7), (0, 2), (19, 18)),
        "one all ignored": Spread((6, 5), (2, 2), (36, 1), silent=(0,)),
        "no rows at all": Spread((0, 0), (0, 0), (19, 18)),
    },
    4: {
        "ragged": Spread((7, 4, 9, 2), (2, 1, 4, 0), (5, 20, 1, 11)),
        "without rows, all ignored, empty shards": Spread((6, 0, 5, 8), (3, 0, 1, 0), (0, 17, 0, 20), silent=(2,)),
    },
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 1.3, "bias": True},
    "weights": {"bias": True, "beside": True},
}
DTYPES = ("float32", "float64", "bfloat16")
IMPLEMENTATIONS = ("reference", "chunked", "fused")
REDUCTIONS = ("mean", "sum", "none")


def make(spread: Spread, rank: int, options: str, dtype: str = "float32") -> Case:
    """The rows of ``rank``, with the layer of all; its loss has an upstream of its own."""
    chosen = dict(OPTIONS[options])
    beside = chosen.pop("beside", False)
    num_rows, num_pairs = spread.num_rows[rank], spread.num_pairs[rank]
    more: dict[str, Any] = {"dtype": getattr(torch, dtype), **chosen}
    case = make_case(num_rows, V, D, num_pairs=num_pairs, seed=20 + rank, upstream=1.0 + rank, **more)
    layer = make_case(1, V, D, seed=7, **more)
    case.weight, case.bias = layer.weight, layer.bias
    if num_rows > 4:
        case.target[[1, 4]] = torch.tensor([-100, V - 1])
    if rank in spread.silent:
        case.target[:] = -100
    if (
        beside
    ):  # of each rank its own: numbers, tensors, a weight of the Mixup term, weights of rows on one alone
        g = torch.Generator().manual_seed(rank)
        case.options |= {"ntp_denominator": 11.5 + rank, "mixup_weight": torch.tensor(0.3 + rank)}
        case.options["mixup_denominator"] = torch.tensor(4 + rank)
        if rank != 1:
            case.options["row_weight"] = torch.rand(num_rows, generator=g)
            case.options["pair_weight"] = torch.rand(num_pairs, generator=g)
    return case


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    down, up = torch.randn(R_LORA, D, generator=g) / D**0.5, torch.randn(V, R_LORA, generator=g)
    return down.to(dtype), up.to(dtype)


def call(
    case: Case, mine: slice, group: Any, dtype: torch.dtype | None = None, **extra: Any
) -> dict[str, Tensor]:
    """One rank's loss, statistics and gradients, of the columns ``mine`` of the layer."""
    hidden, weight, bias = (
        None if t is None else t.to(dtype or t.dtype).clone().requires_grad_()
        for t in (case.hidden, case.weight[mine], None if case.bias is None else case.bias[mine])
    )
    assert hidden is not None and weight is not None
    out = sftmix_loss(
        hidden, weight, case.target, case.lam, bias=bias, exchange=group, **{**case.options, **extra}
    )
    out.loss.backward(torch.full_like(out.loss, case.upstream))
    result = {**out._asdict(), "dhidden": hidden.grad, "dweight": weight.grad}
    if bias is not None:
        result["dbias"] = bias.grad
    return {name: value.detach() for name, value in result.items() if value is not None}


def every_option(
    case: Case, mine: slice, group: Any, impl: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Class weights, token scaling, a main gradient, factors, predictions; then statistics with gradients."""
    assert case.bias is not None
    down, up = factors()
    whole = {"dhidden": case.hidden, "dweight": case.weight, "dbias": case.bias, "ddown": down, "dup": up}
    cut = {"dweight", "dbias", "dup"}
    leaves = {
        name: (value[mine] if name in cut else value).to(dtype).clone().requires_grad_()
        for name, value in whole.items()
    }
    hidden, weight, bias, down, up = leaves.values()
    more: dict[str, Any] = {"bias": bias, "lora": (down, up, SCALING), "exchange": group, "impl": impl}
    # What it holds before stands in it once, whether ranks share it or one process goes through them.
    total = torch.full(weight.shape, 0.25 if group is not None or case.upstream == 1 else 0.0, dtype=dtype)
    out = sftmix_loss(
        hidden, weight, case.target, case.lam, class_weight=torch.linspace(0, 2, V), token_scaling=True,
        want_predicted=True, main_grad=total, **case.options, **more,
    )  # fmt: skip
    head = {name: case.options[name] for name in ("softcap", "logit_scale")}
    tokens = torch.tensor([[0, V - 1, 25], [26, -100, 4]]).repeat(9, 1)[: len(case.target)]
    stats = token_stats(
        hidden, weight, case.target, tokens=tokens, differentiable=True, want_predicted=True, **head, **more
    )
    assert stats.predicted is not None and stats.token_logprob is not None and out.predicted is not None
    g = torch.Generator().manual_seed(4)
    fields = {name: getattr(stats, name) for name in ("logprob", "lse", "entropy", "token_logprob")}
    # One rank asks for no gradient of some statistics, the other for all.
    asked = list(fields.values())[: 2 if case.upstream == 2 else 4]
    loss = sum((torch.randn(t.shape, generator=g) * t).sum() for t in asked)
    out.loss.backward(torch.tensor(case.upstream, dtype=out.loss.dtype), retain_graph=True)
    assert weight.grad is None
    loss.backward()  # type: ignore[union-attr]  # of four
    found = {"loss": out.loss, "predicted": out.predicted, "again": stats.predicted, **fields, "dmain": total}
    found |= {name: value.grad for name, value in leaves.items() if value.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def run_rows(
    case: Case, mine: slice, group: Any, impl: str, reduction: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """linear_cross_entropy; with "none" each row has its own upstream gradient, of either sign."""
    leaves = [case.hidden.to(dtype).clone(), case.weight[mine].to(dtype).clone()]
    leaves = [t.requires_grad_() for t in leaves]
    names = ("softcap", "logit_scale", "label_smoothing", "z_loss")
    options = {name: case.options[name] for name in names}
    loss = linear_cross_entropy(
        *leaves, case.target, reduction=reduction, impl=impl, exchange=group, **options
    )
    upstream = torch.full_like(loss, case.upstream) * torch.linspace(-1, 2, loss.numel()).view_as(loss)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    return {"loss": loss.detach(), "dhidden": gradients[0], "dweight": gradients[1]}


def dtensors(spread: Spread, rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """A head of DTensors, and its gradients' placements."""
    case = make(spread, rank, "everything")
    hidden = case.hidden.clone().requires_grad_()
    head: Any = LossHead(D, V, bias=True, softcap=5.0, logit_scale=1.3)
    assert case.bias is not None
    for name, value in (("weight", case.weight), ("bias", case.bias)):
        setattr(head, name, torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])))
    out: Any = head(hidden, case.target, case.lam, exchange=mesh, label_smoothing=0.2, z_loss=0.02)
    out.loss.backward(torch.full_like(out.loss, case.upstream))
    grads = (head.weight.grad, head.bias.grad)
    assert all(isinstance(g, DTensor) and g.placements == (Shard(0),) for g in grads)
    found = {**out._asdict(), "dhidden": hidden.grad}
    found |= {"dweight": grads[0].to_local(), "dbias": grads[1].to_local()}
    return {name: value.detach() for name, value in found.items() if value is not None}


def refusals(spread: Spread, rank: int, mesh: DeviceMesh) -> dict[str, str]:
    """The message of every call that must fail, of data that is wrong on rank 1 alone too: no rank is left waiting."""
    case, mine, first = make(spread, rank, "plain"), columns(spread.num_columns, rank), rank == 0
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))

    def loss(target: Tensor = case.target, lam: Tensor = case.lam, hidden: Any = None, **options: Any) -> Any:
        hidden = case.hidden if hidden is None else hidden
        options = {"exchange": mesh, **options}
        return lambda: sftmix_loss(hidden, case.weight[mine], target, lam, **options)

    def second_backward(impl: str | None) -> Any:
        def run() -> None:
            weight = case.weight[mine].clone().requires_grad_()
            found = sftmix_loss(case.hidden, weight, case.target, case.lam, exchange=mesh, impl=impl).loss
            torch.autograd.grad(found, weight, create_graph=True)[0].sum().backward()

        return run

    def gathered() -> None:
        head: Any = LossHead(D, V)
        head._is_fsdp_managed_module = True  # as fully_shard leaves it
        head(case.hidden, case.target, exchange=mesh)

    def compiled(fullgraph: bool) -> Any:
        def run() -> None:
            step = torch.compile(loss(), fullgraph=fullgraph, backend="eager")
            assert torch.equal(step().nll, loss()().nll)

        return run

    calls = {
        "beside vocab_parallel": loss(vocab_parallel=mesh),
        "2-D mesh": loss(exchange=square),
        "not a group": loss(exchange="world"),
        "stored": loss(impl="fused", schedule="stored"),
        "target of one rank": loss(case.target if first else torch.full_like(case.target, V)),
        "lam of one rank": loss(lam=case.lam if first else case.lam + 2),
        "z_loss of one rank": loss(z_loss=0.0 if first else 0.1),
        "gradients of one rank": loss(hidden=case.hidden.clone().requires_grad_(first)),
        "implementation of one rank": loss(impl="reference" if first else "chunked"),
        "hidden of one rank": loss(hidden=case.hidden if first else case.hidden.half()),
        "gathered by FSDP2": gathered,
        "double backward": second_backward(None),
        "double backward of the reference": second_backward("reference"),
        "whole graph": compiled(True),
        "parts of a graph": compiled(False),
    }
    found = {name: message(function) for name, function in calls.items()}
    again = call(make(spread, rank, "plain"), mine, mesh)  # nobody is out of step
    return {**found, "after all": str(bool(again["loss"].isfinite()))}


@contextmanager
def counting() -> Iterator[list[tuple[str, int, int]]]:
    """(collective, elements in all, bytes that this rank receives from the others) of every call inside."""
    seen: list[tuple[str, int, int]] = []
    saved = dist.all_gather, dist.all_reduce, rows_module._all_gather, rows_module._reduce_scatter
    world = dist.get_world_size()

    def into(name: str, inner: Any, of: int) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            tensors = args[of] if isinstance(args[of], list) else [args[of]]
            numel = sum(t.numel() for t in tensors)
            seen.append((name, numel, numel * tensors[0].itemsize * (world - 1) // world))
            return inner(*args, **options)

        return counted

    dist.all_gather = into("gather", saved[0], 0)
    dist.all_reduce = into("reduce", saved[1], 0)
    rows_module._all_gather = into("gather rows", saved[2], 0)
    rows_module._reduce_scatter = into("scatter rows", saved[3], 1)
    try:
        yield seen
    finally:
        dist.all_gather, dist.all_reduce, rows_module._all_gather, rows_module._reduce_scatter = saved


TRAFFIC = {"num_rows": 6, "vocab_size": 512, "width": 64, "num_pairs": 2}


def traffic(dtype: str, impl: str) -> dict[str, Any]:
    """Bytes of the collectives, and of the largest tensor, of one forward and backward."""
    case = make_case(
        TRAFFIC["num_rows"], TRAFFIC["vocab_size"], TRAFFIC["width"], num_pairs=TRAFFIC["num_pairs"],
        dtype=getattr(torch, dtype), seed=dist.get_rank(),
    )  # fmt: skip
    part = TRAFFIC["vocab_size"] // dist.get_world_size()
    mine = slice(part * dist.get_rank(), part * (dist.get_rank() + 1))
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight[mine].clone().requires_grad_()
    with counting() as seen, LargestTensor() as largest:
        out = sftmix_loss(hidden, weight, case.target, case.lam, exchange=dist.group.WORLD, impl=impl)
        out.loss.backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape
    return {"seen": seen, "largest": largest.nbytes}


def main(folder: Path) -> None:
    prepare_the_interpreter()
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    group, results = dist.group.WORLD, {}
    for name, spread in SPREADS[world].items():
        mine = columns(spread.num_columns, rank)
        for impl in IMPLEMENTATIONS:
            for options in OPTIONS:
                results[name, options, impl] = call(make(spread, rank, options), mine, group, impl=impl)
            results[name, "every option", impl] = every_option(
                make(spread, rank, "everything"), mine, group, impl
            )
            for reduction in REDUCTIONS:
                case = make(spread, rank, "everything")
                results[name, reduction, impl] = run_rows(case, mine, group, impl, reduction)
        results[name, "again"] = call(make(spread, rank, "everything"), mine, group)
    spread = SPREADS[world]["ragged"]
    mine = columns(spread.num_columns, rank)
    for dtype in DTYPES:
        for impl in IMPLEMENTATIONS:
            if (dtype, impl) != ("float64", "fused"):
                results[dtype, impl] = call(make(spread, rank, "everything", dtype), mine, group, impl=impl)
    case = make(spread, rank, "plain")
    results["mu is 0"] = call(case, mine, group, mixup_weight=0.0 if rank else 0.2)
    for dtype in ("float32", "bfloat16"):
        results["traffic", dtype] = traffic(dtype, "chunked")
    results["traffic", "fused"] = traffic("float32", "fused")
    if world == 2:
        alone = [dist.new_group([each]) for each in range(world)][rank]
        results["one rank"] = call(make(spread, rank, "everything"), slice(0, V), alone)
        mesh = init_device_mesh("cpu", (2,))
        results["dtensors"] = dtensors(spread, rank, mesh)
        results["refusals"] = refusals(spread, rank, mesh)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
