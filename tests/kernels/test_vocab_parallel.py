"""The output layer spread over 2 and 4 gloo processes gives what one process gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests import parity
from tests.kernels.ranks import Results

from .vocab_parallel_ranks import (
    DTYPES,
    IMPLEMENTATIONS,
    OPTIONS,
    REDUCTIONS,
    SCALING,
    SIZES,
    columns,
    every_option,
    factors,
    make,
    upstream_of,
)

# Two processes in `make test`, four in `make slow`.
WORLDS = [pytest.param(world, marks=pytest.mark.slow if world > 2 else ()) for world in SIZES]
CASES = [
    pytest.param(world, name, marks=pytest.mark.slow if world > 2 else ())
    for world, sizes in SIZES.items()
    for name in sizes
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory, "tests.kernels.vocab_parallel_ranks")


def joined(results: list[Any], key: Any) -> dict[str, Tensor]:
    """Rank 0's values with the shards' gradients put together; every rank must hold the same bits of the rest."""
    found = dict(results[0][key])
    for name in found:
        parts = [result[key][name] for result in results]
        if name in ("dweight", "dbias", "dup", "dmain"):
            found[name] = torch.cat(parts)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
    return found


def assert_same(found: dict[str, Tensor], case: parity.Case) -> None:
    """Within the numerical contract, like every implementation."""
    truth = parity.run(case, impl="reference", dtype=torch.float64)
    same_dtype = parity.run(case, impl="reference")
    assert found.keys() == truth.keys()
    assert torch.equal(found["is_top1"], same_dtype["is_top1"])
    same_dtype["loss"] = truth["loss"] + parity.expected_loss_error(same_dtype, truth)
    for name in found.keys() - {"is_top1"}:
        assert found[name].dtype == same_dtype[name].dtype or name == "loss"
        parity.assert_within_contract(name, found[name], same_dtype[name], truth[name])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_value_statistics_and_gradients_are_those_of_one_process(
    ranks: Results, world: int, name: str, options: str
) -> None:
    """Uneven and empty shards, pairs and unpaired rows, ignored members, targets on the borders of shards."""
    sizes = SIZES[world][name]
    for rank, result in enumerate(ranks[world]):
        assert result[name, options]["dweight"].shape == (sizes[rank], 6)
    assert_same(joined(ranks[world], (name, options)), make(options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_every_option_and_modifier_at_once(ranks: Results, world: int, name: str, impl: str) -> None:
    """Class weights of the whole vocabulary, token scaling, a main gradient beside factors, tokens, predictions."""
    found = joined(ranks[world], (name, "every option", impl))
    everything = slice(0, len(make("everything").weight))
    truth, same_dtype = (
        every_option(everything, "reference", None, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        if not value.is_floating_point():
            assert torch.equal(found[key], value), key
        elif value.ndim:
            parity.assert_within_contract(key, found[key], same_dtype[key], value)
        else:
            torch.testing.assert_close(found[key].double(), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(ranks: Results, world: int, dtype: str) -> None:
    found, case = joined(ranks[world], dtype), make("everything", dtype)
    if dtype != "float64":
        return assert_same(found, case)
    for name, value in parity.run(
        case, impl="reference"
    ).items():  # the truth itself, but for its own roundings
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("world", WORLDS)
def test_plain_next_token_rows(ranks: Results, world: int) -> None:
    assert_same(joined(ranks[world], "no pairs"), make("plain", num_pairs=0))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_kernels_serve_a_shard(ranks: Results, world: int, dtype: str) -> None:
    """A target of another shard leaves the row its softmax part: kernels and carries know nothing of the label."""
    pytest.importorskip("triton")
    assert_same(joined(ranks[world], ("fused", dtype)), make("everything", dtype))


@pytest.mark.parametrize("world, name", CASES)
def test_two_runs_are_bitwise_equal(ranks: Results, world: int, name: str) -> None:
    for result in ranks[world]:
        for key, value in result[name, "everything"].items():
            assert torch.equal(value, result[name, "again"][key]), key


def test_apple_59_a_sentinel_matches_no_column_of_another_shard(ranks: Results) -> None:
    """A row whose target is elsewhere gives a shard p > 0 at every column, the last and the first ones too."""
    case, sizes = make("plain"), SIZES[2]["uneven"]
    truth = parity.run(case, impl="reference")["dweight"]
    for rank, result in enumerate(ranks[2]):
        found = result["uneven", "plain"]["dweight"]
        torch.testing.assert_close(found[[0, -1]], truth[columns(sizes, rank)][[0, -1]], rtol=1e-5, atol=1e-6)


def test_dtensor_parameters_of_a_loss_head_get_dtensor_gradients(ranks: Results) -> None:
    first, second = (result["dtensors"] for result in ranks[2])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same(first, make("everything"))


def test_it_compiles_whole_and_gives_the_same_bits(ranks: Results) -> None:
    for result in ranks[2]:
        value, *rest = result["compiled"]
        half = (len(rest) - 1) // 2
        expected, *gradients = rest[half:]
        assert torch.equal(value, expected)
        assert all(torch.equal(a, b) for a, b in zip(rest[:half], gradients, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_low_rank_factors_are_trained_on_a_sharded_head(
    ranks: Results, world: int, name: str, impl: str
) -> None:
    case = make("plain")
    leaves = [t.requires_grad_() for t in (case.hidden.clone(), *factors(case))]
    hidden, down, up = leaves
    weight = case.weight + SCALING * up @ down
    loss = sftmix_loss(hidden, weight, case.target, case.lam, impl="reference").loss
    expected = dict(zip(("hidden", "down", "up"), torch.autograd.grad(loss, leaves), strict=True))
    found = [result[name, "low rank", impl] for result in ranks[world]]
    for result in found:
        torch.testing.assert_close(result["loss"], loss.detach())
        for key in ("hidden", "down"):
            torch.testing.assert_close(result[key], expected[key], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([f["up"] for f in found]), expected["up"], rtol=1e-4, atol=1e-6)


# --- the reference, and the other two functions --------------------------------------------------------------------


@pytest.mark.parametrize("world, name", CASES)
def test_the_reference_gathers_logits(ranks: Results, world: int, name: str) -> None:
    """The specification on several processes is the one on one: the same within the contract, as it stands there."""
    assert_same(joined(ranks[world], (name, "reference")), make("everything"))


def one_process(reduction: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """linear_cross_entropy of the reference with the whole weight."""
    case = make("everything", num_pairs=0)
    assert case.bias is not None
    leaves = [
        t.to(dtype).requires_grad_() for t in (case.hidden.clone(), case.weight.clone(), case.bias.clone())
    ]
    loss = linear_cross_entropy(
        leaves[0],
        leaves[1],
        case.target,
        bias=leaves[2],
        reduction=reduction,
        impl="reference",
        **case.options,
    )
    gradients = torch.autograd.grad(loss, leaves, upstream_of(reduction).to(dtype))
    return {"loss": loss.detach(), **dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=True))}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_linear_cross_entropy_is_that_of_one_process(
    ranks: Results, world: int, name: str, reduction: str, impl: str
) -> None:
    """Value and every gradient; with "none" each row has its own upstream gradient, of either sign."""
    found = joined(ranks[world], (name, reduction, impl))
    truth, same_dtype = one_process(reduction, torch.float64), one_process(reduction, torch.float32)
    if reduction != "none":
        case = make("everything", num_pairs=0)
        case.options["ntp_denominator"] = 1 if reduction == "sum" else None
        rows = parity.run(case, impl="reference"), parity.run(case, impl="reference", dtype=torch.float64)
        torch.testing.assert_close(rows[1]["loss"], truth["loss"])
        same_dtype["loss"] = truth["loss"] + parity.expected_loss_error(*rows)
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        parity.assert_within_contract(key, found[key], same_dtype[key], value)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_statistics_are_those_of_one_process(ranks: Results, world: int, name: str, impl: str) -> None:
    """The entropy, too, of which a shard has a part; with low-rank factors."""

    def whole(dtype: torch.dtype) -> dict[str, Tensor]:
        case = make("cap, scale, bias", num_pairs=0)
        down, up = factors(case)
        assert case.bias is not None
        found = token_stats(
            case.hidden.to(dtype), case.weight.to(dtype), case.target, bias=case.bias.to(dtype),
            lora=(down.to(dtype), up.to(dtype), SCALING), impl="reference", **case.options,
        )  # fmt: skip
        return {name: value for name, value in found._asdict().items() if value is not None}

    found, truth, same_dtype = (
        joined(ranks[world], (name, "statistics", impl)), whole(torch.float64), whole(torch.float32),
    )  # fmt: skip
    assert torch.equal(found.pop("is_top1"), truth.pop("is_top1"))
    for key, value in truth.items():
        parity.assert_within_contract(key, found[key], same_dtype[key], value)


def test_torchs_own_checks_of_the_operators(ranks: Results) -> None:
    for result in ranks[2]:
        assert [set(found.values()) for found in result["opcheck"]] == [{"SUCCESS"}] * 2


REFUSED = {
    "no argument": "ValueError: weight: expected a local tensor; under FSDP2 .* LossHead.forward, got a DTensor",
    "replicated": r"ValueError: weight: expected a DTensor Shard\(0\) on a 1-D mesh, got \(Replicate\(\),\)",
    "by width": r"ValueError: weight: expected a DTensor Shard\(0\) on a 1-D mesh, got \(Shard\(dim=1\),\)",
    "partial": r"ValueError: weight: expected a DTensor Shard\(0\) on a 1-D mesh, got \(Partial",
    "weight on a 2-D mesh": "ValueError: weight: .* on a 2-D mesh",
    "2-D mesh": "ValueError: vocab_parallel: expected a torch.distributed ProcessGroup .* or a 1-D DeviceMesh",
    "not a group": "ValueError: vocab_parallel: expected .*, got str 'world'",
    "other ranks": "ValueError: weight: expected a DTensor on the ranks of vocab_parallel",
    "target too large": r"ValueError: target: expected class indices in \[0, V\).*, got 37 with V=37",
    "target negative": r"ValueError: target: expected class indices in \[0, V\).*, got -1 with V=37",
    "another dtype": r"ValueError: weight: expected float32 \[V_r=.*, D=6\], got float16",
    "stored": "ValueError: schedule: expected 'recompute' or None with vocab_parallel, got 'stored': it makes",
    "double backward": "RuntimeError: sftmix_loss: double backward is not supported",
    "double backward of the reference": "RuntimeError: trying to differentiate twice a function that was marked",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(ranks: Results, name: str) -> None:
    for result in ranks[2]:
        assert re.match(REFUSED[name], result["refusals"][name]), result["refusals"][name]
