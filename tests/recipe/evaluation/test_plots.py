"""The pictures: what is drawn where, with real numbers, and the cases that have no axis or no curve."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sftmix.evaluation import plots
from sftmix.evaluation.curves import exponential_mean
from sftmix.evaluation.plots import plot_confidence, plot_data_map, plot_loss_curves
from sftmix.scores.confidence import make_split
from sftmix.scores.dynamics import Dynamics
from sftmix.scores.halves import Split

PNG = b"\x89PNG\r\n\x1a\n"


def make_dynamics(examples: int = 60, points: int = 3, *, seed: int = 0) -> Dynamics:
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 40, (points, examples))
    nll = random.gamma(2.0, 0.6, (1, examples)) + random.uniform(0, 0.4, (points, examples))
    return Dynamics(
        examples=[f"e{i:03d}" for i in range(examples)],
        step=np.zeros((points, examples), np.int64),
        nll_sum=nll * tokens,
        num_tokens=tokens,
        top1_share=np.exp(-nll),
        source="checkpoint",
    )


def records(steps: int, *, mixup: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {
            "step": i + 1,
            "ntp_loss": 3 - i / steps + random.normal() / 10,
            "mixup_loss": 5 - i / steps if mixup else None,
        }
        for i in range(steps)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to be looked at."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: str | os.PathLike[str]) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of visible texts (titles, labels, tick labels, notes) whose boxes overlap."""
    figure.draw_without_rendering()
    texts = []
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            texts += [label for place, label in ticks if low <= place <= high]
    boxes = [
        (text, text.get_window_extent()) for text in texts if text.get_text().strip() and text.get_visible()
    ]
    found = []
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[i + 1 :]:
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            high = min(a.y1, b.y1) - max(a.y0, b.y0)
            if wide > 1 and high > 1 and one.get_text() != other.get_text():
                found.append((one.get_text(), other.get_text()))
    return found


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if title in axes.get_title())


def test_data_map_shows_every_example_where_it_belongs(tmp_path: Path, drawn: list[Figure]) -> None:
    dynamics = make_dynamics()
    plot_data_map(dynamics, make_split(dynamics), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(PNG)
    assert os.listdir(tmp_path) == ["map.png"]
    main = panel(drawn[0], "Data map of 60 examples, 3 scoring points (checkpoint)")
    dots = main.collections[0]
    np.testing.assert_allclose(dots.get_offsets()[:, 0], dynamics.perplexity.std(axis=0))
    np.testing.assert_allclose(dots.get_offsets()[:, 1], dynamics.perplexity.mean(axis=0))
    np.testing.assert_allclose(dots.get_array(), dynamics.top1_share.mean(axis=0))
    low, high = main.get_ylim()
    assert low > high  # small perplexity, that is high confidence, is on top
    assert "log scale" in main.get_xlabel()
    assert "log scale" in main.get_ylabel()
    labels = [label.get_text() for label in main.get_yticklabels()]
    assert all(label.startswith("−") for label in labels)
    histograms = [axes for axes in drawn[0].axes if axes is not main and axes.patches]
    assert [sum(bar.get_height() for bar in axes.patches) for axes in histograms] == [60, 60, 60]
    assert [axes.get_xlabel().split(" (")[0] for axes in histograms] == [
        "confidence",
        "variability",
        "top-1 share",
    ]


def test_the_median_line_parts_the_halves(tmp_path: Path, drawn: list[Figure]) -> None:
    dynamics = make_dynamics(41)
    split = make_split(dynamics)
    plot_data_map(dynamics, split, tmp_path / "map.png")
    plot_confidence(split, tmp_path / "confidence.png")
    mean = dict(zip(dynamics.examples, dynamics.perplexity.mean(axis=0), strict=True))
    on_map = panel(drawn[0], "Data map").lines[0].get_ydata()[0]
    on_histogram = panel(drawn[1], "Confidence of 41 examples").lines[0].get_xdata()[0]
    for line in (on_map, on_histogram):
        assert (
            max(mean[name] for name in split.confident) < line < min(mean[name] for name in split.unconfident)
        )


def test_one_scoring_point_has_no_variability_axis_and_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    dynamics = make_dynamics(points=1)
    with pytest.warns(UserWarning, match="one scoring point gives no variability axis"):
        plot_data_map(dynamics, make_split(dynamics), tmp_path / "map.png")
    main = panel(drawn[0], "1 scoring point")
    assert "no variability axis" in main.get_xlabel()
    assert main.get_xticks().size == 0
    np.testing.assert_allclose(main.collections[0].get_offsets()[:, 1], dynamics.perplexity[0])
    assert any("no variability" in text.get_text() for axes in drawn[0].axes for text in axes.texts)


def test_confidence_histogram_counts_both_halves(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_confidence(make_split(make_dynamics(41)), tmp_path / "c.png")
    axes = drawn[0].axes[0]
    confident, unconfident = axes.containers
    assert sum(bar.get_height() for bar in confident) == 21
    assert sum(bar.get_height() for bar in unconfident) == 20
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[:2] == ["confident (21)", "unconfident (20)"] or "confident (21)" in texts
    assert any(text.startswith("median −") for text in texts)


def test_loss_curves_of_several_runs(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = {
        "sftmix": records(200),
        "ntp": records(200, mixup=False, seed=1),
        "reference": records(90, mixup=False),
    }
    plot_loss_curves(runs, tmp_path / "loss.png")
    ntp, mixup = drawn[0].axes
    assert [len(ntp.lines), len(mixup.lines)] == [6, 2]
    for (label, run), raw, smooth in zip(runs.items(), ntp.lines[::2], ntp.lines[1::2], strict=True):
        assert smooth.get_label() == label
        assert list(raw.get_xdata()) == [r["step"] for r in run]
        assert list(raw.get_ydata()) == [r["ntp_loss"] for r in run]
        assert raw.get_alpha() < 0.5
        assert (
            np.abs(np.diff(smooth.get_ydata()[20:])).mean() < np.abs(np.diff(raw.get_ydata()[20:])).mean() / 3
        )
    assert [text.get_text() for text in mixup.get_legend().get_texts()] == ["sftmix"]
    assert "nats" in ntp.get_ylabel()
    assert "optimizer step" in ntp.get_xlabel()


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant(tmp_path: Path) -> None:
    assert exponential_mean(np.array([7.0, 1.0]))[0] == 7.0
    np.testing.assert_allclose(exponential_mean(np.full(50, 3.0)), 3.0)


def test_a_run_without_mixup_has_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    gaps = [{**record, "mixup_loss": float("nan")} for record in records(3)]
    plot_loss_curves({"ntp": gaps}, tmp_path / "loss.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["Next-token loss"]


@pytest.mark.parametrize(
    "metrics, message",
    [
        ({}, "metrics: expected records with an ntp_loss, got none"),
        ({"a": []}, "metrics: expected records with an ntp_loss, got none"),
        ({"a": [{"step": 1, "loss": 2.0}]}, "expected step and ntp_loss in record 0 of a, got .*loss.*step"),
        ({"a": [{"ntp_loss": 1.0, "mixup_loss": None}]}, "expected step and ntp_loss in record 0 of a"),
    ],
)
def test_metrics_without_losses_are_refused(tmp_path: Path, metrics: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_loss_curves(metrics, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_a_split_of_other_examples_is_refused(tmp_path: Path) -> None:
    dynamics = make_dynamics(10)
    with pytest.raises(
        ValueError, match="expected the 10 examples of the dynamics, got 2, 1 of them in common"
    ):
        plot_data_map(dynamics, Split(["e000"], ["x"]), tmp_path / "map.png")
    with pytest.raises(ValueError, match="split: expected the confidence of every example, got none"):
        plot_confidence(Split(["a"], ["b"]), tmp_path / "c.png")


@pytest.mark.parametrize(
    "examples, points, spread", [(2, 2, 1.0), (3, 3, 0.0), (500, 2, 0.02), (400, 3, 5.0)]
)
def test_no_text_overlaps_on_any_scale(
    tmp_path: Path, drawn: list[Figure], examples: int, points: int, spread: float
) -> None:
    """Two examples, examples all alike, a narrow range of perplexity, and one over many decades."""
    dynamics = make_dynamics(examples, points)
    mean = dynamics.nll_sum / dynamics.num_tokens
    dynamics = replace(dynamics, nll_sum=(1 + (mean - mean.min()) * spread) * dynamics.num_tokens)
    split = make_split(dynamics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_data_map(dynamics, split, tmp_path / "map.png")
        plot_confidence(split, tmp_path / "c.png")
        plot_loss_curves({"sftmix": records(max(1, examples // 2))}, tmp_path / "l.png")
    for figure in drawn:
        assert overlapping_texts(figure) == []
    for axes in (panel(drawn[0], "Data map"), panel(drawn[1], "Confidence of")):
        axis = axes.yaxis if axes.get_title().startswith("Data") else axes.xaxis
        low, high = sorted(axis.get_view_interval())
        assert sum(low <= tick <= high for tick in axis.get_majorticklocs()) >= 2


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    dynamics = make_dynamics()
    for name in ("a.png", "b.png"):
        plot_data_map(dynamics, make_split(dynamics), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
