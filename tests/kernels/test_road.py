"""One road through the loss: how often a call changes from file to file, and how often it comes back to one.

A station is a stretch of the walk within one file. ``python -m tests.kernels.test_road`` prints the walks. The bounds
are what the package has; the aim for hidden's walk is under 25 stations and no file visited more than twice.
What needs a device, a dtype or a size is handed that, not the tensor: a fact cannot be changed on the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest

from sftmix_kernels import sftmix_loss
from tests.kernels.walking import Station, Walk, walk
from tests.kernels.ways import WAYS, leaves
from tests.parity import make_case


class Bounds(NamedTuple):
    """At most so many; of functions that are handed hidden, and of all."""

    stations: int
    most_visits: int
    all_stations: int
    all_returns: int


BOUNDS = {
    "chunked": Bounds(21, 4, 84, 68),
    "recompute": Bounds(28, 4, 58, 41),
    "stored": Bounds(21, 6, 48, 31),
}


def walks(name: str) -> tuple[Walk, Walk]:
    """Of hidden, and of everything, through a forward and backward; pairs and rows beside them, several chunks."""
    case = make_case(24, 40, 16, num_pairs=8)
    hidden, weight = leaves(case)

    def call() -> None:
        loss = sftmix_loss(hidden, weight, case.target, case.lam, scratch_bytes=2000, **WAYS[name]).loss
        torch.autograd.grad(loss, (hidden, weight))

    return walk(call, hidden), walk(call)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_call_walks_through_few_stations(name: str) -> None:
    if name != "chunked":
        pytest.importorskip("triton")
    (of_hidden, of_all), bounds = walks(name), BOUNDS[name]
    listing = "\n".join(f"{file}: {function}" for file, function in of_hidden.stations)
    assert len(of_hidden.files) <= bounds.stations, listing
    assert of_hidden.most_visits <= bounds.most_visits, listing
    assert len(of_all.files) <= bounds.all_stations and of_all.returns <= bounds.all_returns
    assert of_hidden.files[:3] == ["autocast.py", "functional.py", "arguments.py"]
    assert set(of_hidden.stations) <= set(of_all.stations)


def test_a_walk_is_counted_by_hand() -> None:
    """check_head, then check_tensor in the same file, twice, by the reference's door."""
    from sftmix_kernels import checks, terms

    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with Walk(hidden) as found:
        for _ in range(3):
            checks.check_head(hidden, weight, None)
        terms.times(hidden, hidden)
        checks.plain_number({"hidden": hidden})
    assert found.stations == [
        Station("checks.py", "check_head"), Station("terms.py", "times"), Station("checks.py", "plain_number"),
    ]  # fmt: skip
    assert found.files == ["checks.py", "terms.py", "checks.py"]
    assert (found.returns, found.most_visits) == (1, 2)
    with Walk(None) as everything:
        checks.check_head(hidden, weight, None)
    assert Station("checks.py", "check_tensor") in everything.stations and everything.files == ["checks.py"]


def described(found: Walk) -> str:
    return (
        f"{len(found.stations)} functions, {len(found.files)} stations in {len(set(found.files))} files, "
        f"{found.returns} returns, no file more than {found.most_visits} times"
    )


def main(say: Callable[[str], Any] = print) -> None:
    for name in BOUNDS:
        of_hidden, of_all = walks(name)
        say(f"{name}: {described(of_hidden)}; of everything: {described(of_all)}")
        for file, function in of_hidden.stations:
            say(f"    {file}: {function}")


if __name__ == "__main__":
    main()
