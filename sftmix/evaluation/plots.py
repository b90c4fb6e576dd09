"""The recipe's pictures, drawn from its files: data map, loss curves, confidence histogram.

Perplexity has a heavy tail, so confidence (minus the mean perplexity) and variability (the standard
deviation of the perplexity) are drawn on logarithmic axes, and the axes say so.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from sftmix.evaluation.curves import exponential_mean
from sftmix.files import replacing
from sftmix.scores.dynamics import Dynamics
from sftmix.scores.halves import Split, border

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"  # told apart by colour-blind readers
_RUN_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_CONFIDENCE_LABEL = "confidence = −mean perplexity (log scale)"
_LOG_TICKS = ((1.1, (1.0, 2.0, 3.0, 5.0)), (2.0, (1.0, 2.0, 5.0)), (3.0, (1.0, 3.0)))  # below so many decades
Values = NDArray[np.float64]


def plot_data_map(dynamics: Dynamics, split: Split, path: str | os.PathLike[str]) -> None:
    """Draw each example at its variability and confidence, coloured by top-1 share, with three histograms.

    With fewer than two scoring points there is no variability: the picture says so, spreads the examples
    sideways at will, and a ``UserWarning`` is given. Raises ``ValueError`` when ``split`` has other examples.
    """
    ids = {*split.confident, *split.unconfident}
    if ids != set(dynamics.examples):
        raise ValueError(
            f"split: expected the {len(dynamics.examples)} examples of the dynamics, got {len(ids)}, "
            f"{len(ids & set(dynamics.examples))} of them in common"
        )
    perplexity = dynamics.perplexity
    mean, share = perplexity.mean(axis=0), dynamics.top1_share.mean(axis=0)
    spread = _positive(np.std(perplexity, axis=0)) if dynamics.num_checkpoints > 1 else None
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(2.6, 1))
    main = figure.add_subplot(grid[:, 0])
    points = f"{dynamics.num_checkpoints} scoring point{'s' if dynamics.num_checkpoints > 1 else ''}"
    main.set_title(f"Data map of {len(mean):,} examples, {points} ({dynamics.source})", fontsize=14)
    if spread is None:
        warnings.warn("data map: one scoring point gives no variability axis", UserWarning, stacklevel=2)
        across = np.random.default_rng(0).random(len(mean))
        main.set_xticks([])
        main.set_xlabel("no variability axis: examples were scored at one point only (spread at random)")
    else:
        across = spread
        _log_axis(main, "x", spread)
        zeros = ", zeros at the left edge" if (np.std(perplexity, axis=0) <= 0).any() else ""
        main.set_xlabel(f"variability = standard deviation of perplexity (log scale{zeros})")
    size = float(np.clip(9000 / len(mean), 3, 40))
    dots = main.scatter(
        across, mean, c=share, s=size, cmap="viridis", alpha=0.75, linewidths=0, rasterized=True
    )
    _confidence_axis(main, "y", mean)
    main.set_ylabel(_CONFIDENCE_LABEL)
    _median_line(main, "y", split, mean)
    bar = figure.colorbar(dots, ax=main, location="bottom", fraction=0.05, pad=0.02, aspect=45)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.set_label("top-1 share: tokens of the response that were the model's first choice, mean over points")
    _side_histograms([figure.add_subplot(grid[i, 1]) for i in range(3)], mean, spread, share)
    _save(figure, path)


def plot_confidence(split: Split, path: str | os.PathLike[str]) -> None:
    """Draw the histogram of confidence, the halves in two colours, with the median.

    Raises ``ValueError`` for a split without confidence.
    """
    if not split.confidence:
        raise ValueError("split: expected the confidence of every example, got none")
    halves = [
        -np.array([split.confidence[name] for name in half]) for half in (split.confident, split.unconfident)
    ]
    mean = np.concatenate(halves)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    labels = [
        f"{name} ({len(half):,})" for name, half in zip(("confident", "unconfident"), halves, strict=True)
    ]
    axes.hist(halves, bins=_log_bins(mean, 60).tolist(), stacked=True, color=[_BLUE, _ORANGE], label=labels)
    _confidence_axis(axes, "x", mean)
    _median_line(axes, "x", split, mean)
    axes.set_title(f"Confidence of {len(mean):,} examples", fontsize=14)
    axes.set_xlabel(_CONFIDENCE_LABEL)
    axes.set_ylabel("examples")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_loss_curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]
) -> None:
    """Draw the next-token and Mixup losses of one or several runs by optimizer step.

    ``metrics`` maps a label to records with ``step``, ``ntp_loss`` and ``mixup_loss`` (nats per position;
    ``None`` or NaN where a step has none). The raw values are faint, an exponential mean is on top.
    Raises ``ValueError`` for no records and for records without these values.
    """
    parts = {"ntp_loss": "Next-token loss", "mixup_loss": "Mixup loss (unweighted)"}
    curves = {
        part: {label: _curve(label, records, part) for label, records in metrics.items()} for part in parts
    }
    if not any(len(step) for step, _ in curves["ntp_loss"].values()):
        raise ValueError("metrics: expected records with an ntp_loss, got none")
    shown = [part for part in parts if any(len(step) for step, _ in curves[part].values())]
    figure = Figure(figsize=(6.5 * len(shown), 5), layout="constrained")
    for i, part in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), i)
        for number, (label, (step, loss)) in enumerate(curves[part].items()):
            if len(step):
                colour = _RUN_COLOURS[number % len(_RUN_COLOURS)]
                axes.plot(step, loss, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(step, exponential_mean(loss), color=colour, linewidth=2, label=label)
        axes.set_title(parts[part], fontsize=14)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per token" if part == "ntp_loss" else "nats per mixed position")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        _plain_frame(axes)
    figure.supxlabel("faint: each step; solid: exponential mean", fontsize=9, color=_GREY)
    _save(figure, path)


def _side_histograms(panels: list[Axes], mean: Values, spread: Values | None, share: Values) -> None:
    confidence, variability, top1 = panels
    confidence.hist(mean, bins=_log_bins(mean, 40).tolist(), color=_BLUE)
    _confidence_axis(confidence, "x", mean)
    confidence.set_xlabel("confidence (log scale)")
    if spread is None:
        variability.text(
            0.5, 0.5, "no variability:\none scoring point", ha="center", va="center", color=_GREY
        )
        variability.set_xticks([])
        variability.set_yticks([])
    else:
        variability.hist(spread, bins=_log_bins(spread, 40).tolist(), color=_ORANGE)
        _log_axis(variability, "x", spread)
        variability.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    variability.set_xlabel("variability (log scale)" if spread is not None else "")
    top1.hist(share, bins=np.linspace(0, 1, 41).tolist(), color="#009E73")
    top1.set_xlabel("top-1 share")
    top1.set_xlim(0, 1)
    for panel in panels:
        panel.set_ylabel("examples")
        _plain_frame(panel)
    for panel in (confidence, top1):
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _confidence_axis(axes: Axes, which: str, mean: Values) -> None:
    """Mean perplexity on a logarithmic axis that runs backwards and is labelled with its negative."""
    _log_axis(axes, which, mean)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_inverted(True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"−{_tick_label(value)}"))
    _plain_frame(axes)


def _log_axis(axes: Axes, which: str, values: Values) -> None:
    """A logarithmic axis around ``values`` with a readable number of plain labels."""
    low, high = float(values.min()), float(values.max())
    margin = max((high / low) ** 0.04, 1.1 if high < low * 1.001 else 1.0)
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low / margin, high * margin)
    decades = math.log10(high / low) if high > low else 0.0
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        subs = next((subs for most, subs in _LOG_TICKS if decades < most), (1.0,))
        axis.set_major_locator(LogLocator(subs=subs, numticks=5))
    axis.set_major_formatter(FuncFormatter(_tick_label))
    axis.set_minor_formatter(NullFormatter())


def _tick_label(value: float, _: int | None = None) -> str:
    """A positive number, short at any size."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return (f"{mantissa}×" if mantissa != "1" else "") + f"$10^{{{int(exponent)}}}$"


def _median_line(axes: Axes, which: str, split: Split, mean: Values) -> None:
    """The line between the halves, with its value."""
    found = border(split)
    median = float(np.median(mean)) if found is None else -found[0]
    note = f"{'median' if found is None else found[1]} −{median:.3g}"
    halves = (
        ("confident half, ", "unconfident half")
        if found is not None
        else ("", "halves not cut by confidence")
    )
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    if which == "y":
        axes.axhline(median, color="black", linestyle="--", linewidth=1)
        for text, side, offset in ((f"{halves[0]}{note}", "bottom", 4), (halves[1], "top", -4)):
            axes.annotate(
                text,
                (0.01, median),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, offset),
                textcoords="offset points",
                va=side,
                bbox=box,
            )
    else:
        axes.axvline(median, color="black", linestyle="--", linewidth=1, label=note)


def _curve(label: str, records: Sequence[Mapping[str, Any]], part: str) -> tuple[Values, Values]:
    """Steps and values of one part of the loss, where it has one."""
    points = []
    for i, record in enumerate(records):
        if "step" not in record or part not in record:
            raise ValueError(
                f"metrics: expected step and {part} in record {i} of {label}, got {sorted(record)}"
            )
        if record[part] is not None and math.isfinite(record[part]):
            points.append((record["step"], record[part]))
    step, loss = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return step, loss


def _positive(values: Values) -> Values:
    """Values for a logarithmic axis: zeros are moved to the smallest positive one."""
    positive = values[values > 0]
    return np.maximum(values, positive.min() if len(positive) else 1e-3)


def _log_bins(values: Values, most: int) -> Values:
    """Edges of equal width on a logarithmic axis, fewer for few values."""
    low, high = float(values.min()), float(values.max())
    number = int(np.clip(2 * math.sqrt(len(values)), 8, most))
    edges: Values = np.geomspace(low / 1.001, high * 1.001, number + 1)
    return edges


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the picture in the format of its suffix; the file is whole or absent."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=150, metadata={"Software": None})
