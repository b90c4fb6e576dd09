"""Rows of 2 and 4 gloo processes that exchange hidden states give what one process with the whole head gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import sftmix_loss
from sftmix_kernels.reference import sum_dtype
from tests import parity
from tests.kernels.exchange_ranks import (
    DTYPES,
    IMPLEMENTATIONS,
    OPTIONS,
    REDUCTIONS,
    SPREADS,
    TRAFFIC,
    Spread,
    V,
    call,
    every_option,
    make,
    run_rows,
)
from tests.kernels.ranks import Results

# Two processes in `make test`, four in `make slow`.
WORLDS = [pytest.param(world, marks=pytest.mark.slow if world > 2 else ()) for world in SPREADS]
CASES = [
    pytest.param(world, name, marks=pytest.mark.slow if world > 2 else ())
    for world, spreads in SPREADS.items()
    for name in spreads
]
OF_LAYER = ("dweight", "dbias", "dup", "dmain")  # whole on their owner
TOTAL = (*OF_LAYER, "ddown")  # of all ranks' losses


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory, "tests.kernels.exchange_ranks")


def alone(function: Any, cases: list[parity.Case], *args: Any, **options: Any) -> list[dict[str, Tensor]]:
    """What each rank's call gives with the whole layer; gradients of the layer are summed over the ranks' losses."""
    found = [function(case, slice(0, V), None, *args, **options) for case in cases]
    for name in TOTAL:
        if name in found[0]:
            total = sum(each[name].to(sum_dtype(each[name].dtype)) for each in found)
            for each in found:
                each[name] = total.to(each[name].dtype)
    return found


def assert_ranks(
    found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], same: list[dict[str, Tensor]], sizes: Any
) -> None:
    """Every rank's values and statistics are its own, its part of the layer's gradients is that of all losses.

    What has several numbers is compared as one tensor of all ranks: an error of few numbers is one draw.
    """
    assert all(ours.keys() == truth[0].keys() for ours in found)
    for name in truth[0]:
        for rank, ours in enumerate(found):
            shape = truth[rank][name].shape
            expected = (sizes[rank], *shape[1:]) if name in OF_LAYER else shape
            assert ours[name].shape == expected and ours[name].dtype == same[rank][name].dtype, name
        values, exact, torch_s = ([each[name] for each in side] for side in (found, truth, same))
        if name in TOTAL:  # A's gradient is of own rows: the sum over the ranks is that of one process
            whole = torch.stack(values).sum(dim=0) if name == "ddown" else torch.cat(values)
            values, exact, torch_s = [whole], exact[:1], torch_s[:1]
        elif values[0].ndim:
            values, exact, torch_s = ([torch.cat(side)] for side in (values, exact, torch_s))
        for value, each_exact, each_torch in zip(values, exact, torch_s, strict=True):
            if not value.is_floating_point():
                assert torch.equal(value, each_torch), name
            elif value.dtype == torch.float64:  # the truth itself, but for its own roundings
                torch.testing.assert_close(value, each_exact, rtol=1e-12, atol=1e-14, equal_nan=True)
            else:
                parity.assert_within_contract(name, value, each_torch, each_exact)


def with_expected_error(same: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> None:
    """torch's error in a rank's scalar is at least what its rows' errors lead to expect; parts of it likewise."""
    for each, exact in zip(same, truth, strict=True):
        error = parity.expected_loss_error(each, exact)
        for name in ("loss", "z_loss"):
            each[name] = (exact[name] + error).to(each[name].dtype)


def check(
    ranks: Results, world: int, spread: Spread, key: Any, options: str, dtype: str = "float32", **extra: Any
) -> None:
    cases = [make(spread, rank, options, dtype) for rank in range(world)]
    truth = alone(call, cases, torch.float64, impl="reference", **extra)
    same = alone(call, cases, impl="reference", **extra)
    with_expected_error(same, truth)
    assert_ranks([result[key] for result in ranks[world]], truth, same, spread.num_columns)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_values_statistics_and_gradients_are_those_of_one_process(
    ranks: Results, world: int, name: str, options: str, impl: str
) -> None:
    """Ragged rows and pairs, ranks without either, shards without a column, each loss with its own upstream."""
    check(ranks, world, SPREADS[world][name], (name, options, impl), options)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "dtype, impl", [(d, i) for d in DTYPES for i in IMPLEMENTATIONS if (d, i) != ("float64", "fused")]
)
def test_every_dtype(ranks: Results, world: int, dtype: str, impl: str) -> None:
    check(ranks, world, SPREADS[world]["ragged"], (dtype, impl), "everything", dtype)


def test_a_group_of_one_rank_is_one_process(ranks: Results) -> None:
    for rank, result in enumerate(ranks[2]):
        case = make(SPREADS[2]["ragged"], rank, "everything")
        truth, same = (alone(call, [case], dtype, impl="reference") for dtype in (torch.float64, None))
        with_expected_error(same, truth)
        assert_ranks([result["one rank"]], truth, same, (V,))


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_of_parts_is_the_loss_of_the_joined_batch(ranks: Results, world: int) -> None:
    """With the denominators of all: what a step divided over processes is, in one call of all rows."""
    spread = SPREADS[world]["ragged"]
    cases = [make(spread, rank, "plain", "float64") for rank in range(world)]
    order = [(0, 1), (1, 2), (2, None)]  # confident, partners, the rest; in units of M_r

    def part(values: list[Tensor]) -> Tensor:
        parts = []
        for start, stop in order:
            for value, size in zip(values, spread.num_pairs, strict=True):
                parts.append(value[start * size : None if stop is None else stop * size])
        return torch.cat(parts)

    joined = parity.Case(
        part([case.hidden for case in cases]), cases[0].weight, part([case.target for case in cases]),
        torch.cat([case.lam for case in cases]),
    )  # fmt: skip
    whole = parity.run(joined, impl="reference")
    num_valid = int((joined.target != -100).sum())
    size = sum(spread.num_pairs)
    pairs = int(((joined.target[:size] != -100) & (joined.target[size : 2 * size] != -100)).sum())
    parts = [
        sftmix_loss(
            case.hidden,
            case.weight,
            case.target,
            case.lam,
            ntp_denominator=num_valid,
            mixup_denominator=pairs,
        ).loss
        for case in cases
    ]
    torch.testing.assert_close(sum(parts), whole["loss"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_every_option_and_modifier_at_once(ranks: Results, world: int, name: str, impl: str) -> None:
    """Class weights, token scaling, a main gradient beside factors, tokens; statistics with gradients."""
    spread = SPREADS[world][name]
    cases = [make(spread, rank, "everything") for rank in range(world)]
    truth, same = (alone(every_option, cases, "reference", dtype) for dtype in (torch.float64, torch.float32))
    found = [result[name, "every option", impl] for result in ranks[world]]
    if not sum(spread.num_rows):
        for each in found:
            assert all(not value.any() for key, value in each.items() if key not in ("dmain", "loss"))
        return
    for ours, exact, each in zip(found, truth, same, strict=True):
        torch.testing.assert_close(ours["loss"].double(), exact["loss"], rtol=1e-6, atol=0)
        each["loss"] = ours["loss"]
        exact["loss"] = ours["loss"].double()
    assert_ranks(found, truth, same, spread.num_columns)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("world, name", CASES)
def test_linear_cross_entropy_is_that_of_one_process(
    ranks: Results, world: int, name: str, reduction: str, impl: str
) -> None:
    spread = SPREADS[world][name]
    cases = [make(spread, rank, "everything") for rank in range(world)]
    truth, same = (
        alone(run_rows, cases, "reference", reduction, dtype) for dtype in (torch.float64, torch.float32)
    )
    found = [result[name, reduction, impl] for result in ranks[world]]
    if reduction != "none":
        for ours, exact, each in zip(found, truth, same, strict=True):
            torch.testing.assert_close(ours["loss"].double(), exact["loss"], rtol=1e-6, atol=0)
            each["loss"], exact["loss"] = ours["loss"], ours["loss"].double()
    assert_ranks(found, truth, same, spread.num_columns)


@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_without_a_mixup_term(ranks: Results, world: int) -> None:
    """The number 0 drops the pairs of all ranks but the first; their rows stay."""
    spread = SPREADS[world]["ragged"]
    cases = [make(spread, rank, "plain") for rank in range(world)]
    for rank, case in enumerate(cases):
        case.options["mixup_weight"] = 0.0 if rank else 0.2
    truth, same = (alone(call, cases, dtype, impl="reference") for dtype in (torch.float64, None))
    for each in (*truth, *same):
        each.pop("loss"), each.pop("z_loss")
    found = [
        {k: v for k, v in result["mu is 0"].items() if k not in ("loss", "z_loss")} for result in ranks[world]
    ]
    assert all(result["mixup_nll"].isnan().all() for result in found[1:])
    assert_ranks(found, truth, same, spread.num_columns)


@pytest.mark.parametrize("world, name", CASES)
def test_two_runs_are_bitwise_equal(ranks: Results, world: int, name: str) -> None:
    for result in ranks[world]:
        for key, value in result[name, "everything", "chunked"].items():
            assert torch.equal(value, result[name, "again"][key]), key


def test_dtensor_parameters_of_a_loss_head_get_dtensor_gradients(ranks: Results) -> None:
    spread = SPREADS[2]["ragged"]._replace(num_columns=(19, 18))
    cases = [make(spread, rank, "everything") for rank in range(2)]
    truth, same = (alone(call, cases, dtype, impl="reference") for dtype in (torch.float64, None))
    with_expected_error(same, truth)
    assert_ranks([result["dtensors"] for result in ranks[2]], truth, same, spread.num_columns)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fused"])
def test_traffic_is_of_hidden_states_and_nothing_is_as_large_as_the_head(
    ranks: Results, world: int, kind: str
) -> None:
    rows, whole = TRAFFIC["num_rows"], TRAFFIC["vocab_size"] * TRAFFIC["width"]
    itemsize = 2 if kind == "bfloat16" else 4
    for result in ranks[world]:
        found = result["traffic", kind]
        seen = found["seen"]
        hidden = [(name, each, size) for name, each, size in seen if each == world * rows * TRAFFIC["width"]]
        expected = (world - 1) * rows * TRAFFIC["width"]
        assert hidden == [
            ("gather rows", world * rows * TRAFFIC["width"], expected * itemsize),
            ("scatter rows", world * rows * TRAFFIC["width"], expected * 4),  # in float32
        ]
        # Statistics of each row and mixture from every shard, targets, shares and upstreams in 64 bits; sizes.
        others = sum(size for _, _, size in seen) - sum(size for _, _, size in hidden)
        assert others <= (world - 1) * (rows * (48 * world + 32) + 8 * 32)
        assert max(each for _, each, _ in seen) < whole / world
        assert found["largest"] <= 4 * whole / world


REFUSED = {
    "beside vocab_parallel": "ValueError: exchange: expected None beside vocab_parallel, got both: its ranks hold",
    "2-D mesh": "ValueError: exchange: expected a torch.distributed ProcessGroup .* or a 1-D DeviceMesh",
    "not a group": "ValueError: exchange: expected .*, got str 'world'",
    "stored": "ValueError: schedule: expected 'recompute' or None with exchange, got 'stored': it makes",
    "z_loss of one rank": "ValueError: exchange: expected the same z_loss on every rank, got 0, 0.1",
    "gradients of one rank": "ValueError: exchange: expected the same gradients of hidden on every rank, got 1, 0",
    "implementation of one rank": "ValueError: exchange: expected the same impl on every rank, got 1, 0",
    "gathered by FSDP2": "ValueError: exchange: expected a head that FSDP2 leaves alone",
    "double backward": "RuntimeError: sftmix_loss: double backward .* is not supported with exchange",
    "double backward of the reference": "RuntimeError: trying to differentiate twice a function that was marked",
    "whole graph": r"(?s)Unsupported: .*exchange: expected no torch.compile\(fullgraph=True\)",
    "parts of a graph": "nothing raised",
    "after all": "True",
}
ONE_RANK = {
    "hidden of one rank": r"ValueError: weight: expected float16 \[V_r=.*, D=6\], got float32",
    "target of one rank": r"ValueError: target: expected class indices in \[0, V\).*, got 37 with V=37",
    "lam of one rank": r"ValueError: lam: expected values in \[0, 1\]",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_on_every_rank(ranks: Results, name: str) -> None:
    for result in ranks[2]:
        assert re.match(REFUSED[name], result["refusals"][name]), result["refusals"][name]


@pytest.mark.parametrize("name", ONE_RANK)
def test_what_one_rank_refuses_all_refuse(ranks: Results, name: str) -> None:
    first, second = (result["refusals"][name] for result in ranks[2])
    assert first == "ValueError: exchange: expected a call on every rank, but that of rank 1 is refused"
    assert re.match(ONE_RANK[name], second), second
