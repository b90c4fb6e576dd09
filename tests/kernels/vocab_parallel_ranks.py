"""What test_vocab_parallel runs under torchrun: every case on 2 or 4 gloo processes, each rank's results in a file."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sftmix_kernels import LossHead, linear_cross_entropy, operators, sftmix_loss, token_stats
from sftmix_kernels.arguments import HeadOptions, Rows, Ways, make_call
from sftmix_kernels.call import DIFFERENTIABLE
from tests.interpreter import prepare_the_interpreter
from tests.parity import Case, make_case

V = 37
# Rows of the weight on each rank: uneven, with an empty one, with one column alone, all on the last.
SIZES: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"uneven": (26, 11), "first empty": (0, 37), "last empty": (37, 0), "one column": (1, 36)},
    4: {"uneven": (5, 20, 1, 11), "two empty": (0, 17, 0, 20), "even": (10, 9, 9, 9)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap, scale, bias": {"softcap": 4.0, "logit_scale": 0.7, "bias": True},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 0.01},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 1.3, "bias": True},
}
DTYPES = ("float32", "float64", "bfloat16")
IMPLEMENTATIONS = ("reference", "chunked", "fused")
REDUCTIONS = ("mean", "sum", "none")
R, SCALING = 3, 0.5


def make(options: str, dtype: str = "float32", *, num_pairs: int = 5) -> Case:
    """14 rows: pairs, unpaired rows, ignored members of a pair and of the rest; targets on the shards' borders."""
    found: dict[str, Any] = {
        "num_pairs": num_pairs,
        "dtype": getattr(torch, dtype),
        "ignored": (1, 8, 13),
        "upstream": 3.0,
    }
    case = make_case(14, V, 6, **found, **OPTIONS[options])
    borders = torch.tensor([0, V - 1, 25, 26, 0, 36, 5, 25, 24, 4])
    case.target[:10] = torch.where(case.target[:10] >= 0, borders, -100)
    if num_pairs:
        case.target[num_pairs + 2] = case.target[2]  # a pair with one label
    return case


def columns(sizes: tuple[int, ...], rank: int) -> slice:
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def run_shard(case: Case, sizes: tuple[int, ...], impl: str | None = None) -> dict[str, Tensor]:
    """This rank's call: value, statistics and gradients of its own shard."""
    mine = columns(sizes, dist.get_rank())
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight[mine].clone().requires_grad_()
    bias = None if case.bias is None else case.bias[mine].clone().requires_grad_()
    out = sftmix_loss(
        hidden, weight, case.target, case.lam, bias=bias, impl=impl, vocab_parallel=dist.group.WORLD,
        scratch_bytes=1 << 11, **case.options,
    )  # fmt: skip
    out.loss.backward(torch.full_like(out.loss, case.upstream))
    result = {**out._asdict(), "dhidden": hidden.grad, "dweight": weight.grad}
    if bias is not None:
        result["dbias"] = bias.grad
    return {name: value.detach() for name, value in result.items() if value is not None}


def factors(case: Case) -> tuple[Tensor, Tensor]:
    """A [R, D] and B [V, R] of a low-rank adapter."""
    g = torch.Generator().manual_seed(2)
    return torch.randn(R, 6, generator=g) / 6**0.5, torch.randn(V, R, generator=g)


def every_option(mine: slice, impl: str, group: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The columns ``mine``: class weights, token scaling, a main gradient beside factors; statistics with gradients."""
    case = make("everything")
    assert case.bias is not None
    down, up = factors(case)
    whole = {"dhidden": case.hidden, "dweight": case.weight, "dbias": case.bias, "ddown": down, "dup": up}
    cut = {"dweight", "dbias", "dup"}
    leaves = {
        name: (value[mine] if name in cut else value).to(dtype).requires_grad_()
        for name, value in whole.items()
    }
    hidden, weight, bias, down, up = leaves.values()
    more: dict[str, Any] = {"bias": bias, "lora": (down, up, SCALING), "vocab_parallel": group, "impl": impl}
    total = torch.full(weight.shape, 0.25, dtype=dtype)
    out = sftmix_loss(
        hidden, weight, case.target, case.lam, class_weight=torch.linspace(0, 2, V), token_scaling=True,
        want_predicted=True, main_grad=total, **case.options, **more,
    )  # fmt: skip
    head = {name: case.options[name] for name in ("softcap", "logit_scale")}
    tokens = torch.tensor([[0, V - 1, 25, 25], [26, 5, -100, 4]]).repeat(7, 1)
    stats = token_stats(
        hidden, weight, case.target, tokens=tokens, differentiable=True, want_predicted=True, **head, **more
    )
    assert stats.predicted is not None and stats.token_logprob is not None and out.predicted is not None
    g = torch.Generator().manual_seed(4)
    fields = (stats.logprob, stats.lse, stats.entropy, stats.token_logprob)
    loss = sum((torch.randn(t.shape, generator=g) * t).sum() for t in fields)
    out.loss.backward(retain_graph=True)
    assert weight.grad is None
    loss.backward()
    assert weight.grad is not None
    found = {"loss": out.loss, "z_loss": out.z_loss, "predicted": out.predicted, "again": stats.predicted}
    found |= dict(zip(("logprob", "lse", "entropy", "token_logprob"), fields, strict=True))
    found |= {name: value.grad for name, value in leaves.items() if value.grad is not None}
    return {name: value.detach() for name, value in {**found, "dmain": total}.items()}


def upstream_of(reduction: str) -> Tensor:
    return torch.linspace(-1, 2, 14) if reduction == "none" else torch.tensor(3.0)


def run_rows(reduction: str, sizes: tuple[int, ...], impl: str) -> dict[str, Tensor]:
    """This rank's linear_cross_entropy: value and gradients of its own shard."""
    case, mine = make("everything", num_pairs=0), columns(sizes, dist.get_rank())
    assert case.bias is not None
    leaves = {"dhidden": case.hidden, "dweight": case.weight[mine], "dbias": case.bias[mine]}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    loss = linear_cross_entropy(
        leaves["dhidden"], leaves["dweight"], case.target, bias=leaves["dbias"], reduction=reduction, impl=impl,
        vocab_parallel=dist.group.WORLD, **case.options,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream_of(reduction))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def run_stats(sizes: tuple[int, ...], impl: str, options: str = "cap, scale, bias") -> dict[str, Tensor]:
    """This rank's token_stats, with low-rank factors."""
    case, mine = make(options, num_pairs=0), columns(sizes, dist.get_rank())
    down, up = factors(case)
    found = token_stats(
        case.hidden, case.weight[mine], case.target, bias=None if case.bias is None else case.bias[mine],
        lora=(down, up[mine], SCALING), impl=impl, vocab_parallel=dist.group.WORLD, **case.options,
    )  # fmt: skip
    return {name: value for name, value in found._asdict().items() if value is not None}


def opchecks(sizes: tuple[int, ...]) -> list[dict[str, str]]:
    """torch's own checks of the operators, on every rank at once."""
    case, mine = make("cap, scale, bias"), columns(sizes, dist.get_rank())
    assert case.bias is not None
    down, up = factors(case)
    leaves = [
        t.clone().requires_grad_() for t in (case.hidden, case.weight[mine], case.bias[mine], down, up[mine])
    ]
    ways = Ways(
        (leaves[3], leaves[4], SCALING), dist.group.WORLD, impl="chunked", scratch_bytes=4096, rows=True
    )
    call, _ = make_call(
        *leaves[:2], case.target, leaves[2], HeadOptions(4.0, 0.7), Rows(case.lam, mixup_weight=0.2), ways
    )
    call = call._replace(**{name: getattr(call, name).detach().requires_grad_() for name in DIFFERENTIABLE})
    found = [torch.library.opcheck(operators.terms_fwd, tuple(call))]
    with torch.no_grad():
        kept = operators.terms_fwd(*call)[operators.NUM_TERMS :]
    call = call._replace(**{name: getattr(call, name).detach() for name in DIFFERENTIABLE})
    arguments = (torch.tensor(2.0), torch.rand(14), None, None, None, *call, *kept)
    return [*found, torch.library.opcheck(operators.terms_bwd, arguments)]


def dtensors(mesh: DeviceMesh) -> dict[str, Any]:
    """A head of DTensors, evenly sharded, and its gradients' placements; the same without a mesh is refused."""
    case = make("everything")
    hidden = case.hidden.clone().requires_grad_()
    head: Any = LossHead(6, V, bias=True, softcap=5.0, logit_scale=1.3)
    assert case.bias is not None
    for name, value in (("weight", case.weight), ("bias", case.bias)):
        setattr(head, name, torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])))
    options = {"label_smoothing": 0.2, "z_loss": 0.02}
    out: Any = head(hidden, case.target, case.lam, vocab_parallel=mesh, **options)
    out.loss.backward(torch.full_like(out.loss, case.upstream))
    grads = (head.weight.grad, head.bias.grad)
    assert all(isinstance(g, DTensor) and g.placements == (Shard(0),) for g in grads)
    assert head.weight.grad.to_local().shape == head.weight.to_local().shape
    found = {**out._asdict(), "dhidden": hidden.grad}
    found |= {"dweight": grads[0].full_tensor(), "dbias": grads[1].full_tensor()}
    return {name: value.detach() for name, value in found.items() if value is not None}


def message(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """The message of every call that must fail; all ranks fail alike, so none is left waiting."""
    case = make("plain")
    mine = columns(SIZES[2]["uneven"], dist.get_rank())
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    alone = dist.new_subgroups(1)[0]

    def call(weight: Any = None, group: Any = mesh, target: Tensor = case.target, **options: Any) -> Any:
        weight = case.weight[mine] if weight is None else weight
        return lambda: sftmix_loss(case.hidden, weight, target, case.lam, vocab_parallel=group, **options)

    def second_backward(impl: str | None) -> Any:
        def run() -> None:
            hidden, arguments = (
                case.hidden.clone().requires_grad_(),
                (case.weight[mine], case.target, case.lam),
            )
            loss = sftmix_loss(hidden, *arguments, vocab_parallel=mesh, impl=impl).loss
            (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
            gradient.sum().backward()

        return run

    sharded = distribute_tensor(case.weight, mesh, [Shard(0)])
    partial = DTensor.from_local(case.weight, mesh, [Partial()])
    calls = {
        "no argument": call(sharded, None),
        "replicated": call(distribute_tensor(case.weight, mesh, [Replicate()])),
        "by width": call(distribute_tensor(case.weight, mesh, [Shard(1)])),
        "partial": call(partial),
        "weight on a 2-D mesh": call(distribute_tensor(case.weight, square, [Replicate(), Shard(0)])),
        "2-D mesh": call(group=square),
        "not a group": call(group="world"),
        "other ranks": call(sharded, alone),
        "target too large": call(target=torch.where(case.target == 0, V, case.target)),
        "target negative": call(target=torch.where(case.target == 0, -1, case.target)),
        "another dtype": call(case.weight[mine].half()),
        "stored": call(impl="fused", schedule="stored"),
        "double backward": second_backward(None),
        "double backward of the reference": second_backward("reference"),
    }
    return {name: message(function) for name, function in calls.items()}


def compiled(sizes: tuple[int, ...]) -> list[Tensor]:
    """Value and gradients of one compiled graph of all three functions."""
    case, mine = make("everything"), columns(sizes, dist.get_rank())
    down, up = factors(case)
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight[mine], down, up[mine])]
    group, upstream = dist.group.WORLD, upstream_of("none")

    def loss(hidden: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        more: dict[str, Any] = {"vocab_parallel": group, "softcap": 5.0, "lora": (down, up, SCALING)}
        pairs = sftmix_loss(hidden, weight, case.target, case.lam, **more).loss
        rows = linear_cross_entropy(hidden, weight, case.target, reduction="none", **more)
        return (
            pairs + (upstream * rows).sum() + token_stats(hidden, weight, case.target, **more).entropy.sum()
        )

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    expected = loss(*leaves)
    return [value, *torch.autograd.grad(value, leaves), expected, *torch.autograd.grad(expected, leaves)]


def low_rank(sizes: tuple[int, ...], impl: str) -> dict[str, Tensor]:
    """Loss and gradients with a low-rank adapter whose B is sharded like the weight, which is frozen."""
    case, mine = make("plain"), columns(sizes, dist.get_rank())
    down, up = factors(case)
    leaves = {"hidden": case.hidden, "down": down, "up": up[mine]}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    loss = sftmix_loss(
        leaves["hidden"], case.weight[mine], case.target, case.lam, vocab_parallel=dist.group.WORLD, impl=impl,
        lora=(leaves["down"], leaves["up"], SCALING),
    ).loss  # fmt: skip
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def main(folder: Path) -> None:
    prepare_the_interpreter()
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results: dict[Any, Any] = {}
    for name, sizes in SIZES[world].items():
        for options in OPTIONS:
            results[name, options] = run_shard(make(options), sizes)
        results[name, "again"] = run_shard(make("everything"), sizes)
        results[name, "reference"] = run_shard(make("everything"), sizes, "reference")
        for impl in IMPLEMENTATIONS:
            mine = columns(sizes, rank)
            results[name, "every option", impl] = every_option(mine, impl, dist.group.WORLD)
            results[name, "statistics", impl] = run_stats(sizes, impl)
            results[name, "low rank", impl] = low_rank(sizes, impl)
            for reduction in REDUCTIONS:
                results[name, reduction, impl] = run_rows(reduction, sizes, impl)
    for dtype in DTYPES:
        results[dtype] = run_shard(make("everything", dtype), SIZES[world]["uneven"])
    results["no pairs"] = run_shard(make("plain", num_pairs=0), SIZES[world]["uneven"])
    for dtype in ("float32", "bfloat16"):
        results["fused", dtype] = run_shard(make("everything", dtype), SIZES[world]["uneven"], "fused")
    if world == 2:
        mesh = init_device_mesh("cpu", (2,))
        results["dtensors"] = dtensors(mesh)
        results["refusals"] = refusals(mesh)
        results["compiled"] = compiled(SIZES[2]["uneven"])
        results["opcheck"] = opchecks(SIZES[2]["uneven"])
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
