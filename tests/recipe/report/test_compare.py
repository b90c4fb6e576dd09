"""`sftmix compare`: figures, settings, agreement of scores and halves, and a page; bad folders by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sftmix.cli import app
from sftmix.report.compare import agreements, common_examples, content, differing, figures, gather_runs
from sftmix.scores.confidence import make_split
from tests.recipe.report import folders
from tests.recipe.report.conftest import Open
from tests.recipe.report.test_page import AUDIT

FIRST = folders.dynamics(60)
SECOND = replace(
    FIRST, nll_sum=FIRST.nll_sum * np.random.default_rng(7).uniform(0.6, 1.6, FIRST.nll_sum.shape)
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    other = {
        "base": folders.figures(4.0),
        "sftmix": folders.figures(2.9, samples=[folders.sample("another <b>answer</b>")]),
    }
    return [
        folders.write_run(tmp_path / "one", FIRST),
        folders.write_run(tmp_path / "two", SECOND, knobs=["mixup.weight=0.5", "seed=3"], evaluation=other),
        folders.write_run(tmp_path / "three", folders.dynamics(50, seed=9), stages=["score", "split"]),
    ]


def call(*words: object) -> str:
    done = CliRunner().invoke(app, ["compare", *map(str, words)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def test_agreement_of_scores_and_halves(runs: list[Path]) -> None:
    two, three = agreements(gather_runs(runs))
    a, b = (-run.perplexity.mean(axis=0) for run in (FIRST, SECOND))
    assert two.common == two.examples == 60
    assert two.spearman == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    halves = [{*make_split(run).confident} for run in (FIRST, SECOND)]
    assert two.shared_confident == len(halves[0] & halves[1]) / len(halves[0] | halves[1])
    both = [[name in half for name in FIRST.examples] for half in halves]
    assert two.same_half == np.mean([x == y for x, y in zip(*both, strict=True)])
    assert three.common == 0 and three.same_half is None and np.isnan(three.spearman)


def test_only_common_examples_are_compared(tmp_path: Path) -> None:
    keep = slice(10, 60)
    part = replace(
        FIRST, examples=FIRST.examples[keep],
        **{name: getattr(FIRST, name)[:, keep] for name in ("step", "nll_sum", "num_tokens", "top1_share")},
    )  # fmt: skip
    paths = [folders.write_run(tmp_path / "a", FIRST), folders.write_run(tmp_path / "b", part)]
    (found,) = agreements(gather_runs(paths))
    assert (found.examples, found.common) == (50, 50) and found.spearman == pytest.approx(1.0)
    columns, about = common_examples(gather_runs(paths))
    assert about is not None and about["total"] == 50 and about["of"] == [60, 50]
    assert FIRST.examples[0].encode() not in columns["ids"] and FIRST.examples[10].encode() in columns["ids"]


def test_figures_and_their_differences(runs: list[Path]) -> None:
    rows = {(row["model"], row["run"]): row for row in figures(gather_runs(runs))}
    assert list(rows) == [
        ("base model", "one"), ("base model", "two"), ("NTP", "one"), ("SFTMix", "one"), ("SFTMix", "two")
    ]  # fmt: skip
    assert rows["SFTMix", "two"]["d_nll"] == pytest.approx(2.9 - 3.1)
    assert rows["SFTMix", "two"]["d_perplexity"] == pytest.approx(np.exp(2.9) - np.exp(3.1))
    assert rows["base model", "two"]["d_nll"] == 0 and rows["SFTMix", "one"]["d_nll"] is None


def test_only_settings_that_differ(runs: list[Path]) -> None:
    assert differing(gather_runs(runs[:2])) == [["seed", 0, 3], ["mixup.weight", 0.2, 0.5]]
    assert differing(gather_runs([runs[0], runs[2]])) == []


def test_other_held_out_examples_are_marked(tmp_path: Path) -> None:
    told = {"base": folders.figures(4.0, about={"heldout": "others"})}
    paths = [folders.write_run(tmp_path / "a"), folders.write_run(tmp_path / "b", evaluation=told)]
    found = gather_runs(paths)
    assert [row["same_heldout"] for row in figures(found) if row["model"] == "base model"] == [True, False]
    assert any("b are about other examples than a's" in note for note in content(found)["notes"])
    assert "b *" in call(*paths, "--out", tmp_path / "c.html")


def test_the_terminal_and_the_page(runs: list[Path], tmp_path: Path, open_page: Open) -> None:
    out = tmp_path / "page.html"
    said = call(*runs, "--out", out)
    for part in ("3.1000", "-0.2000", "mixup.weight", "rank correlation", f"page: {out}"):
        assert part in said, part
    (spearman,) = re.findall(r"two\s+│\s+60\s+│\s+60\s+│\s+(\S+)", said)
    for width in (1280, 390):
        page = open_page(out, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width and page.seen == []
    page = open_page(out)
    assert spearman in page.locator("#scores .content").inner_text()
    last = page.locator("#results tbody tr").nth(4).locator("th, td").all_inner_texts()
    assert last[:4] == ["SFTMix", "two", "2.9000", "−0.2000"]
    assert (
        "another <b>answer</b>" in page.locator("#samples").inner_text()
        and page.locator("#samples b").count() == 0
    )
    lead = page.locator("#map-lead").inner_text()  # the third has no example of the first
    assert "60 examples that one, two have in common. Not among them" in lead and "no scores: three." in lead
    assert page.locator("#maps .scatter").count() == 3


def test_an_example_chosen_in_one_map_is_chosen_in_all(
    runs: list[Path], tmp_path: Path, open_page: Open
) -> None:
    out = tmp_path / "page.html"
    call(*runs[:2], "--out", out)
    page = open_page(out)
    assert page.locator("#maps .scatter").count() == 3
    page.locator("#maps .scatter").nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    best = SECOND.examples[int(np.argmin(SECOND.perplexity.mean(axis=0)))]
    assert page.locator("#map-table tbody tr").count() == 1
    cells = page.locator("#map-table tbody td").all_inner_texts()
    means = [run.perplexity.mean(axis=0) for run in (FIRST, SECOND)]
    place = [int((mean < mean[FIRST.examples.index(best)]).sum()) for mean in means]
    assert cells[0] == best and place[1] == 0
    assert cells[4].replace("−", "-") == str(place[1] - place[0])
    shown = [float(f"{-mean[FIRST.examples.index(best)]:.5g}") for mean in means]
    assert [float(cells[k].replace("−", "-")) for k in (1, 3)] == shown
    found, drawn = page.evaluate(f"({AUDIT}).contrasts()")
    assert [line for line in found if line[0] < 4.5] == [] and min(drawn) >= 4.5


def test_bad_folders_are_refused_by_name(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs: expected at least two run folders, got 1"):
        call(runs[0])
    with pytest.raises(ValueError, match=r"runs: expected different run folders, got .*one more than once"):
        call(runs[0], f"{runs[1]}/../one")
    with pytest.raises(ValueError, match=r"run_dir: expected a run folder with config.yaml, got .*nowhere"):
        call(runs[0], tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"out: expected the name of an HTML file, got .*page.txt"):
        call(*runs, "--out", tmp_path / "page.txt")
    (runs[0] / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config.yaml: expected YAML"):
        call(*runs)
    assert not (tmp_path / "compare.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [folders.write_run(tmp_path / name / "demo") for name in ("a", "b")]
    assert [label for label, _ in gather_runs(paths)] == ["a/demo", "b/demo"]


def test_runs_that_have_nothing_yet(tmp_path: Path, open_page: Open) -> None:
    paths = [folders.write_run(tmp_path / name, stages=[]) for name in ("a", "b")]
    out = tmp_path / "c.html"
    said = call(*paths, "--out", out)
    assert "no run has held-out figures" in said and "settings: the same in all runs" in said
    page = open_page(out)
    assert "No scores to compare." in page.locator("#scores").inner_text() and page.seen == []
    assert "No data maps side by side" in page.locator("#map-help").inner_text()
