"""The breakdown names operators and adds up."""

from __future__ import annotations

import pytest
import torch

from bench import breakdown


def test_products_and_the_rest_add_up() -> None:
    weight = torch.randn(300, 200)

    def call() -> None:
        torch.mm(weight, weight.t()).exp_()

    (_, products), (_, others), *rows = breakdown.breakdown(call, rounds=2)
    named = dict(rows)
    assert named["aten::mm"] == products > 0 and named["aten::exp_"] > 0
    assert others == pytest.approx(sum(named.values()) - products)


def test_the_command_names_provider_and_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert breakdown.main(["--shapes", "16x64x8", "--rounds", "1", "--lines", "3"]) == 0
    printed = capsys.readouterr().out
    assert "ours:chunked, sftmix, 16x64x8, float32" in printed and "products" in printed
