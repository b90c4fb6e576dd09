"""What a report says: the figures that stand elsewhere, and in words what a run has not come to."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sftmix.report.content import content, whole_numbers
from sftmix.report.curves import MOST, PANELS, curve, panels
from sftmix.report.examples import axis, halves_on, packed, scores
from sftmix.report.gather import gather
from sftmix.report.lambdas import histogram, lambdas
from sftmix.report.packing import in_base64
from sftmix.report.texts import Text, Texts, cut
from sftmix.run.folder import RunFolder
from sftmix.run.report import results_table
from sftmix.scores.confidence import make_split, write_split
from sftmix.scores.halves import Split
from sftmix.training.pairs import draw_lam, epoch_pairs
from tests.recipe.report import folders
from tests.recipe.report.conftest import Open


def said(folder: Path, told: Texts | None = None) -> dict[str, Any]:
    return content(gather(folder), told or Texts())


def body(page: Any) -> str:
    return str(page.locator("body").inner_text())


def test_figures_are_those_of_the_terminal(tmp_path: Path, open_page: Open) -> None:
    folder = folders.write_run(tmp_path / "r")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(results_table(RunFolder(folder)))
    rows = [re.split(r"\s*│\s*", line.strip()) for line in captured.get().splitlines() if "│" in line]
    page = open_page(folders.report(folder))
    cells = page.locator("#results tbody tr").all()
    assert [row.locator("th, td").all_inner_texts() for row in cells] == rows and len(rows) == 3
    assert page.locator("#results caption").inner_text() == "Held-out answers: 64 examples, 1009 tokens"


def test_infinite_perplexity_and_figures_that_are_no_numbers(tmp_path: Path, open_page: Open) -> None:
    told = {"base": folders.figures(800.0, perplexity=math.inf)}
    told["sftmix"] = folders.figures(math.nan, perplexity=math.nan)
    page = open_page(folders.report(folders.write_run(tmp_path / "r", evaluation=told)))
    assert "inf" in page.locator("#results tbody tr").nth(0).inner_text()
    assert page.locator("#results tbody tr").nth(1).inner_text().count("nan") == 2
    assert page.seen == []


def test_one_scoring_point_has_no_variability(tmp_path: Path, open_page: Open) -> None:
    run = folders.dynamics(points=1)
    page = open_page(folders.report(folders.write_run(tmp_path / "r", run), folders.texts(run)))
    assert "One point gives no variability" in page.locator("#map-lead").inner_text()
    assert page.locator("#map-table th", has_text="variability").count() == 0
    assert page.locator("input[name=least]").count() == 0 and page.seen == []
    box = page.eval_on_selector("#map-picture .scatter", "e => JSON.parse(e.dataset.box)")
    found = scores(run, make_split(run))
    ends = axis(found.num_tokens.astype(float))
    x = box["left"] + box["width"] * np.log(found.num_tokens / ends["from"]) / math.log(
        ends["to"] / ends["from"]
    )
    ends = axis(found.perplexity)
    y = box["top"] + box["height"] * np.log(found.perplexity / ends["from"]) / math.log(
        ends["to"] / ends["from"]
    )
    place = page.locator("#map-picture canvas.over")
    place.scroll_into_view_if_needed()
    corner = place.bounding_box()
    page.mouse.move(corner["x"] + x[0], corner["y"] + y[0])
    assert page.locator("#map-picture .card .id").inner_text() == found.ids[0]


@pytest.mark.parametrize("examples", [2, 3])
def test_very_few_examples(tmp_path: Path, open_page: Open, examples: int) -> None:
    run = folders.dynamics(examples)
    page = open_page(folders.report(folders.write_run(tmp_path / "r", run), folders.texts(run)))
    assert page.locator("#map-table tbody tr").count() == examples
    assert page.locator("ol.extremes li").count() == 2 and page.seen == []


def test_equal_confidences(tmp_path: Path, open_page: Open) -> None:
    run = folders.nearly_equal(folders.dynamics())
    page = open_page(folders.report(folders.write_run(tmp_path / "r", run), folders.texts(run)))
    assert "Drawn at the edge: 40 examples with variability 0" in page.locator("#map-note").inner_text()
    assert "correlation of confidence and length: unknown" in page.locator("#length-note").inner_text()
    assert page.seen == []


def test_infinite_scores_stand_at_the_edge_and_are_counted(tmp_path: Path, open_page: Open) -> None:
    run = folders.dynamics(points=1)
    run.nll_sum[0, 3] = 2000.0 * run.num_tokens[0, 3]
    with np.errstate(over="ignore"):
        page = open_page(folders.report(folders.write_run(tmp_path / "r", run), folders.texts(run)))
    assert "Drawn at the edge: 1 example with infinite confidence" in page.locator("#map-note").inner_text()
    assert "confidence −∞" in page.locator("ol.extremes").nth(1).locator("li").first.inner_text()
    assert page.seen == []


STATES = {
    "begun": ([], ["No scores yet", "No held-out figures", "No λ: SFTMix was not trained"]),
    "scored": (["score"], ["They are not split yet.", "halves (split.parquet): not there, `sftmix split`"]),
    "split": (["score", "split"], ["No held-out figures", "No λ: SFTMix was not trained"]),
    "next-token only": (
        ["score", "split", "ntp", "evaluate"],
        ["trained here", "reference, NTP", "No λ: SFTMix"],
    ),
    "without scores": (["ntp", "sftmix"], ["λ: without the halves the pairs are not known", "No scores yet"]),
}


@pytest.mark.parametrize("state", STATES)
def test_a_run_that_stopped_half_way_says_what_is_missing(
    state: str, tmp_path: Path, open_page: Open
) -> None:
    stages, sentences = STATES[state]
    folder = folders.write_run(tmp_path / "r", stages=stages)
    page = open_page(folders.report(folder))
    for sentence in sentences:
        assert sentence in body(page), sentence
    assert page.locator(".uplot").count() >= 6 and page.seen == []


def test_a_folder_with_settings_alone(tmp_path: Path, open_page: Open) -> None:
    folder = folders.write_run(tmp_path / "r", stages=[])
    for name in ("reference/metrics.jsonl", "stages.json", "data.json"):
        (folder / name).unlink()
    page = open_page(folders.report(folder))
    assert "No optimizer step yet." in body(page) and page.seen == []


def test_a_split_made_by_hand_has_no_confidence(tmp_path: Path, open_page: Open) -> None:
    run = folders.dynamics()
    folder = folders.write_run(tmp_path / "r", run, stages=["score", "sftmix"])
    write_split(folder / "split.parquet", Split(run.examples[::2], run.examples[1::2]))
    found = gather(folder)
    assert found.scores is not None and sorted(set(found.scores.half.tolist())) == [0, 1]
    assert found.scores.median == pytest.approx(np.median(run.perplexity.mean(axis=0)))
    page = open_page(folders.report(folder, folders.texts(run)))
    page.get_by_role("button", name="unconfident half").click()
    assert page.locator("#map-table caption").inner_text() == "20 chosen examples"


@pytest.mark.parametrize(
    "name", ["dynamics.parquet", "split.parquet", "evaluation.json", "data.json", "stages.json"]
)
def test_a_damaged_file_is_named_and_the_rest_shown(name: str, tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "r")
    (folder / name).write_bytes(b"not what it was")
    notes = said(folder)["notes"]
    assert any(name in note for note in notes), notes
    assert said(folder)["curves"]


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    told = {"base": {**folders.figures(4.0), "perplexity": "high"}}
    folder = folders.write_run(tmp_path / "r", evaluation=told)
    folders.write_metrics(folder, "train-ntp", [{"step": "one", "ntp_loss": 2.0}])
    page = said(folder)
    assert page["results"] is None and page["curves"] == [] and page["map"]["confident"] == 20
    for part in ("held-out figures", "curves"):
        assert any(note.startswith(f"{part}: cannot be shown") for note in page["notes"]), page["notes"]


def test_ids_that_look_like_numbers_are_texts(tmp_path: Path, open_page: Open) -> None:
    ids = ["1610521604143693812", "1610521604143693813", "007", "1e5", "0x10", "-0"]
    run = folders.dynamics(6, ids=ids)
    page = open_page(folders.report(folders.write_run(tmp_path / "r", run), folders.texts(run)))
    page.get_by_role("button", name="id", exact=True).click()
    assert page.locator("#map-table tbody td:first-child").all_inner_texts() == sorted(ids)


def test_a_split_of_other_examples_is_named(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "r")
    write_split(folder / "split.parquet", make_split(folders.dynamics(seed=5)))
    told = said(folder)
    assert any("not those of the scores" in note for note in told["notes"])
    assert told["map"]["split"] is False and told["lambdas"] is None


def test_another_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir: expected a run folder with config.yaml, got .*nothing"):
        gather(tmp_path / "nothing")


# ---- curves ----


def test_every_finite_value_of_a_short_run_is_there(tmp_path: Path) -> None:
    found = folders.records(20, mixup=True)
    found[7]["ntp_loss"] = None
    found[9] = {**found[9], "skipped": True}
    told = curve("a", found, PANELS[0])
    assert told["steps"] == list(range(1, 21)) and told["bad"] == 1 and told["values"][7] is None
    assert told["skipped"] == [10]
    for record, value in zip(found, told["values"], strict=True):
        assert record["ntp_loss"] is None or value == float(f"{record['ntp_loss']:.6g}")


def test_a_long_run_keeps_its_highest_and_lowest_values() -> None:
    found = folders.records(30_000, mixup=False)
    found[12_345]["grad_norm"] = 99.0
    found[23_456]["grad_norm"] = 0.001
    told = curve("a", found, next(panel for panel in PANELS if panel.name == "grad_norm"))
    at = dict(zip(told["steps"], told["values"], strict=True))
    assert len(at) <= MOST and told["of"] == 30_000
    assert at[12_346] == 99.0 and at[23_457] == 0.001 and {1, 30_000} <= set(at)
    assert all(value == float(f"{found[step - 1]['grad_norm']:.6g}") for step, value in at.items())


def test_a_run_without_a_mixup_loss_has_no_curve_of_it() -> None:
    runs = {"n": folders.records(5, mixup=False), "s": folders.records(5, mixup=True)}
    told = {panel["name"]: panel["curves"] for panel in panels(runs)}
    assert [each["label"] for each in told["mixup_loss"]] == ["s"] and told["mixup_loss"][0]["k"] == 1
    assert told["peak_memory_bytes"][0]["last"] == pytest.approx(2.0, abs=1e-5)


def test_steps_without_a_number_are_told_and_left_open(tmp_path: Path, open_page: Open) -> None:
    folder = folders.write_run(tmp_path / "r", steps=9)
    found = folders.records(9, mixup=True)
    for k in (2, 3, 5, 6):  # step 5 stands alone between two gaps
        found[k]["ntp_loss"] = None
    folders.write_metrics(folder, "train-sftmix", found)
    page = open_page(folders.report(folder))
    figure = page.locator("#curves figure").first
    assert "SFTMix: 4 steps without a finite value, left open." in figure.inner_text()
    points = page.evaluate("""() => {
      const data = [[1, 2, 3, 4, 5, 6, 7], [1, 2, null, 3, null, 5, 6]];
      return [alone({ data }, 1), alone({ data: [[1, 2], [7, undefined]] }, 1)];
    }""")
    assert points == [[3], [0]]


def test_a_constant_curve_is_drawn_as_one(tmp_path: Path, open_page: Open) -> None:
    folder = folders.write_run(tmp_path / "r")
    for name in ("reference", "train-ntp", "train-sftmix"):
        folders.write_metrics(
            folder, name, [{**record, "lr": 1e-4} for record in folders.records(12, mixup=False)]
        )
    page = open_page(folders.report(folder))
    assert page.evaluate("roomy(null, 1e-4, 1e-4)") == pytest.approx([0.9e-4, 1.1e-4])
    figure = page.locator("#curves figure", has_text="Learning rate")
    assert figure.inner_text().count("last 0.0001") == 3


def test_curves_are_read_by_the_keyboard(tmp_path: Path, open_page: Open) -> None:
    folder = folders.write_run(tmp_path / "r")
    page = open_page(folders.report(folder))
    page.locator("#curves .plot").first.focus()
    for step in (1, 2):
        page.keyboard.press("ArrowRight")
        runs = {"reference": folders.records(12, mixup=False)}
        runs |= {name: folders.records(12, mixup=False, seed=1) for name in ("NTP", "SFTMix")}
        losses = {name: records[step - 1]["ntp_loss"] for name, records in runs.items()}
        values = " · ".join(f"{name} {float(f'{loss:.6g}')}" for name, loss in losses.items())
        assert page.locator("#curves .readout").first.inner_text() == f"step {step}: {values}"


# ---- lambdas, lengths, axes ----


@pytest.mark.parametrize("lam", ["pair", "token", "batch"])
def test_lambdas_are_drawn_again_for_the_steps_that_were_made(lam: str) -> None:
    """11 pairs and an odd one at 8 sequences a step are 3 steps an epoch; 4 steps end in the second one's first."""
    run = folders.dynamics(23)
    split = make_split(run)
    sizes = dict(zip(run.examples, run.num_tokens[0].tolist(), strict=True))
    settings = {"seed": 4, "mixup.alpha": 0.3, "mixup.lam": lam, "train.batch_size": 8}
    found = np.concatenate(list(lambdas(split, settings, steps=4, num_supervised=sizes)))
    expected = []
    for epoch, pairs in ((0, 11), (1, 4)):
        for pair in epoch_pairs(split, seed=4, epoch=epoch, alpha=0.3)[:pairs]:
            keys = {"seed": 4, "epoch": epoch, "alpha": 0.3}
            if lam == "pair":
                expected.append(pair.lam)
            elif lam == "token":
                size = min(sizes[pair.confident], sizes[pair.unconfident or ""])
                expected += draw_lam(index=pair.index, size=size, **keys).tolist()
            elif pair.index % 4 == 0:
                expected.append(draw_lam(index=pair.index // 4, **keys))
    assert found.tolist() == expected
    told = histogram([found[:5], found[5:]])
    assert told["total"] == len(expected) == sum(told["counts"]) and told["mean"] == pytest.approx(
        np.mean(expected)
    )


def test_lambdas_are_not_guessed(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "r")
    assert said(folder)["lambdas"]["total"] == 20 * 2 + 8  # 12 steps of 4 pairs: 5 an epoch
    record = {"train-sftmix": {"settings": folders.settings_of(make_split(folders.dynamics(seed=3)))}}
    (folder / "stages.json").write_text(json.dumps(record))
    told = said(folder)
    assert told["lambdas"] is None and any("other halves than those" in note for note in told["notes"])
    (folder / "stages.json").write_text("{}")
    assert any("not recorded in stages.json" in note for note in said(folder)["notes"])
    settings = {"seed": 0, "mixup.alpha": 1, "train.batch_size": 2}
    with pytest.raises(ValueError, match=r"got none of mixup\.lam"):
        lambdas(make_split(folders.dynamics()), settings, steps=1, num_supervised=None)


def test_histograms_count_every_example(tmp_path: Path) -> None:
    run = folders.dynamics(500)
    found = scores(run, make_split(run))
    ends = axis(found.perplexity)
    assert sum(ends["counts"]) == 500
    halves = halves_on(found.perplexity, found.half, ends)
    assert [sum(part) for part in halves] == [250, 250, 0]
    assert np.array(halves).sum(axis=0).tolist() == ends["counts"]
    told = whole_numbers(np.array([3.0, 3, 4, 9, 200]))
    assert told["counts"][0] == 3 and sum(told["counts"]) == 5
    assert (told["least"], told["median"], told["most"]) == (3, 4, 200)


def test_lengths_are_those_of_the_tokens(tmp_path: Path) -> None:
    run = folders.dynamics()
    told = said(folders.write_run(tmp_path / "r", run), folders.texts(run))["lengths"]
    supervised = run.num_tokens[0]
    assert told["supervised"] == supervised.sum() and told["tokens"] == (2 * supervised + 5).sum()
    assert told["by_tokens"]["most"] == 2 * supervised.max() + 5 and sum(told["share"]) == 40


# ---- texts and size ----


def test_texts_are_cut_to_fit_and_ids_never(tmp_path: Path) -> None:
    run = folders.dynamics(300)
    found = scores(run, make_split(run))
    random = np.random.default_rng(1)
    long = {name: Text("".join(random.choice(list("abcdefgh "), 900)), "y" * 70) for name in run.examples}
    for most in (100_000, 60_000, 30_000):
        columns, about = packed(found, Texts(short=long), most_bytes=most)
        assert sum(len(in_base64(blob)) for blob in columns.values()) <= most
        assert 10 <= about["cut"] < 900 and about["has_texts"]
        for name in found.ids:
            assert name.encode() in columns["ids"]
            assert cut(long[name].prompt, about["cut"]).encode() in columns["texts"]
        assert about["answers"] == (about["cut"] >= 40) == (b"y" * 30 in columns["texts"])
    columns, about = packed(found, Texts(short=long), most_bytes=0)
    assert about["has_texts"] is False and len(columns["texts"]) == 4 * 600


def test_a_cut_text_ends_in_dots() -> None:
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 6) == "abcde…" and cut("abc", 0) == ""


def test_missing_texts_are_told(tmp_path: Path, open_page: Open) -> None:
    page = open_page(folders.report(folders.write_run(tmp_path / "r")))
    assert "texts of the examples: not in this page" in page.locator("#notes").inner_text()
    assert "No texts are in this page." in page.locator("#precision").inner_text()
    assert page.locator("#map-table th", has_text="text").count() == 0


def test_more_examples_than_are_drawn(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftmix.report.examples.MOST", 100)
    run = folders.dynamics(1000)
    found = scores(run, make_split(run))
    assert len(found.shown) == 100 and found.shown[0] == 0 and found.shown[-1] == 999
    assert np.diff(found.shown).min() >= 10
    page = open_page(folders.report(folders.write_run(tmp_path / "r", run), folders.texts(run)))
    assert page.locator("#map-lead").inner_text().startswith("100 of 1,000 examples, chosen evenly by rank")


def test_lone_surrogates_of_samples_are_shown_and_not_fatal(tmp_path: Path, open_page: Open) -> None:
    told = {"base": folders.figures(2.0, samples=[folders.sample("half \ud83d pair \x00 nul")])}
    page = open_page(folders.report(folders.write_run(tmp_path / "r", evaluation=told)))
    assert "half" in page.locator("#samples").inner_text() and page.seen == []


def test_hashes_and_versions_are_told(tmp_path: Path, open_page: Open) -> None:
    import torch

    page = open_page(folders.report(folders.write_run(tmp_path / "r", knobs=["train.epochs=7"])))
    text = page.locator("#settings").inner_text()
    for part in (
        "train.epochs",
        "training examples, tokens and masks",
        "e1",
        f"torch {torch.__version__}",
        "h1",
    ):
        assert part in text, part
    assert "train.batch_size" not in text  # a default: among all settings, which are folded
