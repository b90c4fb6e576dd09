"""A report of 50,000 examples is one file under 2 MB, whose ids are whole and whose map still answers at once."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from sftmix.report.content import content
from sftmix.report.examples import scores
from sftmix.report.gather import gather
from sftmix.report.texts import Text, Texts
from sftmix.scores.confidence import make_split
from tests.recipe.report import folders
from tests.recipe.report.conftest import Open

MANY = 50_000


def realistic(count: int, *, seed: int = 0) -> list[str]:
    """Texts of 20 to 120 words drawn from 8,000 by Zipf's law: they compress as English does, or worse."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    sizes = random.integers(2, 10, 8000)
    words = np.array(["".join(random.choice(letters, size)) for size in sizes])
    share = 1 / np.arange(1, len(words) + 1)
    lengths = random.integers(20, 120, count)
    drawn = words[random.choice(len(words), lengths.sum(), p=share / share.sum())]
    parts = np.split(drawn, np.cumsum(lengths)[:-1])
    return [" ".join(part).capitalize() + "." for part in parts]


@pytest.fixture(scope="module", params=[5_000, pytest.param(MANY, marks=pytest.mark.slow)])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Texts]:
    run = folders.dynamics(request.param, 2)
    folder = folders.write_run(tmp_path_factory.mktemp("large") / "run", run, steps=3000)
    prompts = realistic(request.param)
    said = {name: Text(prompts[i], prompts[i - 777]) for i, name in enumerate(run.examples)}
    plain = folders.texts(run)
    told = Texts(
        short=said, long=said, num_tokens=plain.num_tokens, num_supervised=plain.num_supervised, source=plain.source
    )  # fmt: skip
    return folders.report(folder, told), told


def test_so_many_examples_are_under_two_megabytes(large: tuple[Path, Texts]) -> None:
    """Their texts, at full length, would take more at either size; what room there is is used."""
    path, _ = large
    assert 1_970_000 < path.stat().st_size < 2_000_000


def test_the_page_of_so_many_says_what_it_cut_and_answers(large: tuple[Path, Texts], open_page: Open) -> None:
    path, told = large
    many = len(told.short) > 20_000
    page, run = open_page(path), gather(path.parent).scores
    assert run is not None
    said = page.locator("#precision").inner_text()
    assert f"rounded to {4 if many else 6} significant digits; ids are whole" in said
    (size,) = re.findall(r"cut to at most (\d+) characters", said)
    assert ("of the prompt" in said) == many
    assert (20 if many else 150) < int(size) < max(len(text.prompt) for text in told.short.values())
    found = content(gather(path.parent), told)["extremes"]["least"]
    assert found[0]["prompt"] == told.long[run.ids[-1]].prompt  # whole, though the map's are cut
    page.focus("#map-picture .scatter")
    started = time.perf_counter()
    page.keyboard.press("ArrowDown")
    spoken = page.locator("#map-picture .spoken").inner_text()
    numbers = [float(f"{value:.{4 if many else 6}g}") for value in (run.perplexity[0], run.variability[0])]
    assert spoken.startswith(
        f"{run.ids[0]}, rank 1, confident, confidence −{numbers[0]}, variability {numbers[1]}, "
    )
    page.get_by_role("button", name="unconfident half").click()
    assert page.locator("#map-table caption").inner_text() == f"{len(told.short) // 2:,} chosen examples"
    page.locator("#map-table th button", has_text="last loss").click()
    last = min(run.loss[run.half == 1])
    assert float(page.locator("#map-table tbody td").nth(6 - 1).inner_text()) == pytest.approx(last, rel=1e-3)
    assert time.perf_counter() - started < 20
    assert page.seen == []


def test_a_smaller_run_has_more_digits() -> None:
    small = scores(run := folders.dynamics(100), make_split(run))
    assert small.digits == 6
