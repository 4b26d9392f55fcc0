"""A study's results for people: tables in Markdown and figures, made from the numbers alone."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipelines.data.storage import Location, open_folder
from pipelines.evaluation.plots import COLOURS, DRAWING, new_figure, to_svg
from pipelines.evaluation.study import BASELINE
from pipelines.evaluation.study_results import (
    TABLE_METRICS,
    Cells,
    RankingResult,
    Result,
    StudyNumbers,
    metric_named,
    to_json,
)
from pipelines.evaluation.tables import number

ARROWS = {"up": "↑", "down": "↓"}
CLAIMED_METRICS = ("class_f1", "frechet_codec", "frechet", "diversity")
MARKERS = "o^sDv"
LEGEND_COLUMNS, LEGEND_ROW_INCHES = 3, 0.17
TABLES, NUMBERS = "tables.md", "results.json"
Points = Sequence[tuple[float, float]]
Looks = Mapping[str, Mapping[str, Any]]
"""How matplotlib draws each name."""


def write_results(
    folder: Location,
    *,
    done: str,
    cells: Cells,
    val_cells: Cells,
    rankings: Mapping[str, Mapping[int, RankingResult]],
    rounds: tuple[Mapping[str, Points], Mapping[str, Points]],
    worker_seconds: Mapping[str, float],
    compared_with: Sequence[str],
    claims: Sequence[tuple[str, str]],
) -> str:
    """Write `tables.md`, `results.json` and the figures of a study, whole or in part; returns the tables.

    `rounds` are (reward, class-aware F1) minus M_0's and (loser's, winner's) displacements by arm, round by round.
    """
    text = f"{done}\n"
    files: dict[str, str] = {}
    content: dict[str, Any] = {"done": done, "worker_seconds": dict(worker_seconds)}
    if rankings:
        text += f"\n## The reward as a ranker, on val\n\n{ranking_table(rankings)}"
        content["rankings"] = {
            n: {s: asdict(r) | {"share": r.share} for s, r in f.items()} for n, f in rankings.items()
        }
        files["best_of_n.svg"] = best_of_n_figure(rankings)
    if val_cells:
        on_val = StudyNumbers(val_cells)
        text += f"\n## The arms, on val, where decisions are made\n\n{values_table(on_val)}"
        text += difference_tables(on_val, (BASELINE,))
    if cells:
        numbers = StudyNumbers(cells)
        text += f"\n## The claims, on test\n\n{claims_table(numbers, claims)}" if claims else ""
        text += f"\n## The arms, on test\n\n{values_table(numbers)}"
        text += f"\n## The arms on test, each minus others\n{difference_tables(numbers, compared_with)}"
        content |= to_json(numbers, compared_with)
        files |= _figures(numbers, *rounds)
    if worker_seconds:
        text += f"\n## Cost\n\n{cost_table(worker_seconds)}"
    files |= {TABLES: text, NUMBERS: json.dumps(content, indent=1) + "\n"}
    place = open_folder(folder)
    for name, file in files.items():
        place.write_bytes(name, file.encode())
    return text


def _figures(numbers: StudyNumbers, scored: Mapping[str, Points], moved: Mapping[str, Points]) -> dict[str, str]:
    on_val = "On val, M_0 and after each round; means over replicates"
    at_end = "At the end of each round; means over replicates"
    looks = _looks(name for name in (*numbers.cells, *scored, *moved) if name != BASELINE)
    return {
        "frontier.svg": frontier_figure(numbers, BASELINE, "frechet_codec", "class_f1", looks),
        "diversity.svg": frontier_figure(numbers, BASELINE, "diversity", "class_f1", looks),
        "reward_and_f1.svg": lines_figure(scored, "reward R minus M_0's", "class-aware F1 minus M_0's", on_val, looks),
        "displacement.svg": lines_figure(moved, "loser's displacement", "winner's displacement", at_end, looks),
    }


def values_table(numbers: StudyNumbers) -> str:
    """Values of every subject, after what the cells mean."""
    metrics = _known_metrics(numbers)
    lines = [
        f"{numbers.num_clips} clips. Mean over replicates [95 % interval over clips] ± standard deviation over",
        "replicates; in differences **bold** where the interval leaves out zero and every replicate has the same sign.",
        "",
        *_table(
            ["subject", "replicates", *_titles(metrics)],
            [[s, str(len(numbers.cells[s])), *(_cell(numbers.value(s, m)) for m in metrics)] for s in numbers.cells],
        ),
    ]
    return "\n".join(lines) + "\n"


def difference_tables(numbers: StudyNumbers, compared_with: Sequence[str]) -> str:
    """Differences of every subject from each reference that is done."""
    metrics = _known_metrics(numbers)
    lines: list[str] = []
    for reference in (name for name in compared_with if name in numbers.cells):
        rows = [
            [s, *(_difference_cell(numbers.difference(s, reference, m)) for m in metrics)]
            for s in numbers.cells
            if s != reference
        ]
        lines += [
            "",
            f"Minus {reference}, paired by clip and replicate:",
            "",
            *_table(["subject", *_titles(metrics)], rows),
        ]
    return "\n".join(lines) + "\n"


def claims_table(numbers: StudyNumbers, claims: Sequence[tuple[str, str]]) -> str:
    """The comparisons that the study was made for, of those that have a replicate in common."""
    rows = [
        [
            f"{subject} minus {reference}",
            *(_difference_cell(numbers.difference(subject, reference, m)) for m in CLAIMED_METRICS),
        ]
        for subject, reference in claims
        if numbers.shared(subject, reference)
    ]
    return "\n".join(_table(["", *_titles(CLAIMED_METRICS)], rows)) + "\n"


def ranking_table(found: Mapping[str, Mapping[int, RankingResult]]) -> str:
    """How well each kind of reward ranks, by reward and replicate."""
    rows = []
    for name, by_seed in found.items():
        rhos = [result.rho.value for result in by_seed.values()]
        shares = [result.share for result in by_seed.values()]
        each = " ".join(f"{rho:.3f}" for rho in rhos)
        rows.append(
            [name, f"{np.mean(rhos):.3f}", each, f"{np.mean(shares):.2f}", " ".join(f"{s:.2f}" for s in shares)]
        )
    header = ["reward", "rank rho", "by replicate", "share of the oracle's gain", "by replicate"]
    return "\n".join(_table(header, rows)) + "\n"


def best_of_n_figure(found: Mapping[str, Mapping[int, RankingResult]]) -> str:
    """The best of n candidates of M_0 by each kind of reward, and by the independent score itself, as SVG."""
    curves = {name: _mean_curve([result.picked for result in by_seed.values()]) for name, by_seed in found.items()}
    oracles = [result.oracle for by_seed in found.values() for result in by_seed.values()]
    lines = {**curves, "independent score": _mean_curve(oracles)}
    title = "Best of n on val; means over replicates"
    return lines_figure(lines, "candidates", "class-aware F1", title, _looks(lines))


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> list[tuple[float, float]]:
    return [(float(n), float(np.mean([curve[n] for curve in curves]))) for n in sorted(curves[0])]


def cost_table(worker_seconds: Mapping[str, float]) -> str:
    """Worker seconds of each kind of step, medians over replicates."""
    rows = [[name, f"{seconds:.0f}"] for name, seconds in worker_seconds.items()]
    return "\n".join(_table(["step", "worker seconds"], rows)) + "\n"


def frontier_figure(numbers: StudyNumbers, reference: str, other: str, wanted: str, looks: Looks) -> str:
    """Each subject's change of `wanted` against its change of `other` from the reference, as SVG."""
    figure, axes = new_figure(
        f"{metric_named(other).title} minus {reference}",
        f"{metric_named(wanted).title} minus {reference}",
        "Mean over replicates; bars: 95 % intervals over clips",
    )
    with matplotlib.rc_context(DRAWING):
        axes.axhline(0, color="#5b6675", linewidth=0.7)
        axes.axvline(0, color="#5b6675", linewidth=0.7)
        for subject in (name for name in numbers.cells if name != reference):
            x, y = (numbers.difference(subject, reference, metric) for metric in (other, wanted))
            if x is None or y is None:
                continue
            look = looks[subject]
            axes.plot(x.mean.value, y.mean.value, linestyle="none", markersize=5, label=subject, **look)
            axes.hlines(y.mean.value, x.mean.lo, x.mean.hi, color=look["color"], linewidth=0.8)
            axes.vlines(x.mean.value, y.mean.lo, y.mean.hi, color=look["color"], linewidth=0.8)
    _add_legend(figure)
    return to_svg(figure)


def lines_figure(lines: Mapping[str, Points], x_label: str, y_label: str, title: str, looks: Looks) -> str:
    """One line of points a name, marked from the first to the last, as SVG."""
    figure, axes = new_figure(x_label, y_label, title)
    with matplotlib.rc_context(DRAWING):
        for name, points in lines.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, markersize=4, linewidth=1, label=name, **looks[name])
            if all(value == int(value) for value in x):
                axes.set_xticks(x)
    _add_legend(figure)
    return to_svg(figure)


def _add_legend(figure: Figure) -> None:
    """Below the axes, which keep their height however many names were drawn."""
    num_names = len(figure.axes[0].get_legend_handles_labels()[1])
    if num_names == 0:
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_ROW_INCHES * math.ceil(num_names / LEGEND_COLUMNS))
    with matplotlib.rc_context(DRAWING):
        figure.legend(frameon=False, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7, columnspacing=1.0)


def _looks(names: Iterable[str]) -> Looks:
    """A colour and a marker of its own for each name, the same in every figure."""
    return {
        name: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index // len(COLOURS) % len(MARKERS)]}
        for index, name in enumerate(dict.fromkeys(names))
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _known_metrics(numbers: StudyNumbers) -> list[str]:
    return [m for m in TABLE_METRICS if any(numbers.value(subject, m) for subject in numbers.cells)]


def _titles(metrics: Sequence[str]) -> list[str]:
    return [f"{metric_named(name).title} {ARROWS[metric_named(name).better]}" for name in metrics]


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    spread = "" if math.isnan(result.spread) else f" ± {result.spread:.3f}"
    return number(result.mean) + spread


def _difference_cell(result: Result | None) -> str:
    if result is None:
        return "-"
    m = result.mean
    spread = "" if math.isnan(result.spread) else f" ± {result.spread:.3f}"
    text = f"{m.value:+.3f} [{m.lo:+.3f}, {m.hi:+.3f}]{spread}"
    signs = {value > 0 for value in result.by_seed.values()}
    return f"**{text}**" if (m.lo > 0 or m.hi < 0) and len(signs) == 1 else text
