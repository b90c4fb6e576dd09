"""The section ``sftmix:`` is read and checked without axolotl: every refusal, by the name of the option."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pydantic = pytest.importorskip("pydantic", reason="needs pydantic, which axolotl brings")

from sftmix.axolotl.section import PLUGIN, REFUSED, SFTMixArgs  # noqa: E402


class File(SFTMixArgs):
    """As axolotl merges it: a class with all its options."""

    model_config = pydantic.ConfigDict(extra="allow")
    micro_batch_size: int = 4


def read(section: Any = None, **others: Any) -> File:
    return File(sftmix={"reference": "online"} if section is None else section, plugins=[PLUGIN], **others)


def test_values_get_their_types_and_defaults() -> None:
    found = read({"reference": "online", "mixup_weight": "0.5", "reference_epochs": 3}).sftmix
    assert found is not None and (found.mixup_weight, found.reference_epochs, found.mixup_alpha) == (
        0.5,
        3,
        0.5,
    )
    assert read().model_dump(exclude_none=True)["sftmix"]["mixup_weight"] == 0.2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"reference": "online", "mixup_wieght": 0.1}, "mixup_wieght"),
        ({"reference": "online", "mixup_weight": -1}, "mixup_weight: expected"),
        ({"reference": "online", "mixup_weight": "much"}, "mixup_weight"),
        ({"reference": "offline"}, "reference: expected 'online' or None"),
        ({"reference": "online", "mixup_lam": "row"}, "mixup_lam: expected one of pair, token, batch"),
        ({"mixup_weight": 0.1}, "sftmix: expected one of reference: online, dynamics: FILE and split: FILE"),
        ({"dynamics": "a", "split": "b"}, "got dynamics and split"),
        ({"reference": "online", "split": "b"}, "got reference and split"),
        ({"reference": "online", "reference_epochs": 0}, "reference_epochs: expected at least 1"),
    ],
)
def test_what_a_section_cannot_have_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(section)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_options_that_cannot_be_beside_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        read(**{name: 2})
    for unset in (None, False, 0):
        read(**{name: unset})
    if "parallel" in name:
        read(**{name: 1})
    plain = File(micro_batch_size=3, **{name: 2})  # without the section nothing is refused
    assert plain.sftmix is None


def test_an_odd_batch_and_a_missing_section_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size: expected an even number, whole pairs, got 3"):
        read(micro_batch_size=3)
    with pytest.raises(ValueError, match="sftmix: expected a section"):
        File(plugins=[PLUGIN])


def test_the_package_is_imported_without_axolotl() -> None:
    """axolotl goes on without a plugin whose import fails, so nothing may fail before the plugin is asked for."""
    code = "import sys, sftmix.axolotl as a; assert not {'torch', 'axolotl'} & sys.modules.keys(); print(a.__all__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "SFTMixPlugin" in found.stdout, found.stderr
