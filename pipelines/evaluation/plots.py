"""Plots: how rewards and measures are spread, and reward against the independent score."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipelines.evaluation.ranking_quality import first_candidate_score
from pipelines.evaluation.scores import ClipScores

COLOURS = ("#1f5fbf", "#e0813a", "#17a673", "#8d63c9", "#c2417a", "#5b6675", "#b8a11f", "#3aa6b9")
DRAWING: dict[Any, Any] = {
    "svg.hashsalt": "listening-page",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
}
"""A fixed salt and no date make the same scores give the same bytes."""


def reward_histogram(scores: Mapping[str, ClipScores]) -> str:
    """How the reward of the clips is spread, one outline a subject, as SVG."""
    return to_svg(histogram_of({label: s.values["reward"] for label, s in scores.items()}))


def histogram_of(rewards: Mapping[str, np.ndarray]) -> Figure:
    """How rewards are spread, one outline a name; rewards that are not finite are left out."""
    known = {label: values[np.isfinite(values)] for label, values in rewards.items()}
    every = np.concatenate([*known.values(), np.zeros(0)])
    figure, axes = new_figure("reward R of each sound", "share of sounds", "Reward; dotted: the mean")
    if len(every):
        edges = np.histogram_bin_edges(every, bins=30)
        for (label, values), colour in zip(known.items(), _colours(len(known)), strict=True):
            share = np.histogram(values, edges)[0] / max(len(values), 1)
            axes.stairs(share, edges, color=colour, linewidth=1.6, label=_plain(label), fill=False)
            if len(values):
                axes.axvline(float(values.mean()), color=colour, linewidth=0.9, linestyle=":")
        _legend(figure)
    return figure


def value_histogram(values: np.ndarray, label: str, title: str) -> str:
    """How finite values [N], N at least 1, are spread, in counts, as SVG; dotted: their median."""
    figure, axes = new_figure(label, "clips", title)
    counts, edges = np.histogram(values, bins=40)
    axes.stairs(counts, edges, color=COLOURS[0], fill=True, alpha=0.75)
    axes.axvline(float(np.median(values)), color=COLOURS[5], linewidth=0.9, linestyle=":")
    return to_svg(figure)


def reward_against_score(scores: Mapping[str, ClipScores]) -> str:
    """Reward against the independent score, one dot a clip and subject."""
    by_events = any(s.has_events for s in scores.values())
    score_label = "class-aware onset F1 of the clip" if by_events else "minus log-mel distance"
    figure, axes = new_figure("reward R", score_label, "Each dot is one clip of one subject")
    for (label, subject), colour in zip(scores.items(), _colours(len(scores)), strict=True):
        reward, score = subject.values["reward"], first_candidate_score(subject)
        known = np.isfinite(reward) & np.isfinite(score)
        if known.any():
            axes.scatter(reward[known], score[known], s=9, alpha=0.55, color=colour, linewidths=0, label=_plain(label))
    if axes.collections:
        _legend(figure)
    return to_svg(figure)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _plain(label: str) -> str:
    """A label that matplotlib neither reads as mathematics nor hides (a leading underscore)."""
    return "\u200b" + label.replace("$", r"\$")


def _legend(figure: Figure) -> None:
    figure.legend(frameon=False, loc="outside lower center", ncols=4)


def new_figure(x_label: str, y_label: str, title: str) -> tuple[Figure, Axes]:
    """An empty figure in the pages' style, with one pair of axes."""
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        figure.suptitle(title, fontsize=10, color="#5b6675")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.2)
    return figure, axes


def to_svg(figure: Figure) -> str:
    """SVG element (without the XML prologue, which does not belong inside HTML)."""
    with matplotlib.rc_context(DRAWING):
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]
