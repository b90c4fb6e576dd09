"""Every modifier of a call with every other, under every engine and schedule: right, or refused by the table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss
from sftmix_kernels.choice import REFUSED, SCHEDULES
from tests.kernels.ways import WAYS, leaf
from tests.parity import Case, assert_within_contract, make_case

N, V, D, M, R = 14, 40, 12, 5, 3
# What may be asked of a call beside its rows; "rows" is an upstream of each row's own, linear_cross_entropy's "none".
MODIFIERS = (
    "lora", "vocab_parallel", "exchange", "main_grad", "rows", "class_weight", "token_scaling", "softcap",
    "label_smoothing",
)  # fmt: skip
GROUPS = ("vocab_parallel", "exchange")
PAIRS = [pair for pair in combinations(MODIFIERS, 2) if pair not in REFUSED and pair[::-1] not in REFUSED]
ENGINES = [name for name in WAYS if name != "reference"]
pairs = pytest.mark.parametrize("pair", PAIRS, ids="+".join)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process group of this process alone: every shard is the whole vocabulary."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def results(
    way: dict[str, Any], chosen: tuple[str, ...], group: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Value and gradients of a call with the ``chosen`` modifiers; what main_grad received is its dweight."""
    case: Case = make_case(N, V, D, num_pairs=M, bias=True, ignored=(3,))
    g = torch.Generator().manual_seed(1)
    factors = torch.randn(R, D, generator=g) / 3, torch.randn(V, R, generator=g)
    assert case.bias is not None
    hidden, weight, bias, down, up = leaf(
        *(t.to(dtype) for t in (case.hidden, case.weight, case.bias, *factors))
    )
    main_grad = torch.zeros(V, D, dtype=dtype)
    options: dict[str, Any] = {
        "lora": (down, up, 0.5), "vocab_parallel": group, "exchange": group, "main_grad": main_grad,
        "class_weight": torch.linspace(0, 2, V), "token_scaling": True, "softcap": 2.0, "label_smoothing": 0.2,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if name in chosen} | way | {"bias": bias}
    if "rows" in chosen:
        value = linear_cross_entropy(hidden, weight, case.target, reduction="none", **options)
        value.backward(torch.linspace(-1, 2, N, dtype=value.dtype))
    else:
        value = sftmix_loss(hidden, weight, case.target, case.lam, **options).loss
        value.backward(torch.tensor(2.0, dtype=value.dtype))
    found = {"value": value.detach(), "dhidden": hidden.grad, "dbias": bias.grad}
    found["dweight"] = main_grad if "main_grad" in chosen else weight.grad
    assert (weight.grad is None) == ("main_grad" in chosen) and (down.grad is None) == ("lora" not in chosen)
    if "lora" in chosen:
        found |= {"dA": down.grad, "dB": up.grad}
    return {name: each for name, each in found.items() if each is not None}


def reasons(name: str, chosen: tuple[str, ...]) -> list[str]:
    """Why the table refuses the modifiers, one by one, beside a schedule."""
    return [REFUSED[modifier, name] for modifier in chosen if (modifier, name) in REFUSED]


@pairs
@pytest.mark.parametrize("name", ENGINES)
def test_every_pair_of_modifiers_is_right_or_refused(group: Any, name: str, pair: tuple[str, str]) -> None:
    why = reasons(name, pair)
    if why:
        with pytest.raises(ValueError, match=r"^schedule: expected 'recompute' or None with ") as error:
            results(WAYS[name], pair, group, torch.float32)
        assert any(reason in str(error.value) for reason in why)
        return
    # The reference by itself: one process, no main gradient.
    plain = tuple(modifier for modifier in pair if modifier not in (*GROUPS, "main_grad"))
    same, truth = (results(WAYS["reference"], plain, None, dtype) for dtype in (torch.float32, torch.float64))
    ours = results(WAYS[name], pair, group, torch.float32)
    assert ours.keys() == truth.keys()
    for each, value in ours.items():
        assert value.any()
        assert_within_contract(each, value, same[each], truth[each])


@pairs
def test_the_reference_refuses_no_pair(group: Any, pair: tuple[str, str]) -> None:
    plain = tuple(modifier for modifier in pair if modifier not in (*GROUPS, "main_grad"))
    ours, alone = (results(WAYS["reference"], each, group, torch.float64) for each in (pair, plain))
    assert ours.keys() == alone.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, alone[name])


@pytest.mark.parametrize("entry", REFUSED, ids="+".join)
def test_every_entry_of_the_table_is_refused_with_its_reason(group: Any, entry: tuple[str, str]) -> None:
    modifier, other = entry
    assert modifier in MODIFIERS and other in (*SCHEDULES, *MODIFIERS)
    way = WAYS.get(other, {})
    argument = modifier if other in MODIFIERS else "schedule"
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got ") as error:
        results(way, (modifier,) if way else entry, group, torch.float32)
    assert REFUSED[entry] in str(error.value)
