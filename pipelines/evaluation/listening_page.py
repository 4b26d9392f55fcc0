"""The listening page as one self-contained HTML text: scores on top, then clip after clip every sound side by side.

Pure composition of strings from plain values; everything that came from outside (labels, clip ids, captions, event
names) is escaped, and a content policy in the page forbids any request.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.evaluation.bootstrap import Estimate
from pipelines.evaluation.page_style import CSS, SCRIPT
from pipelines.evaluation.ranking_quality import BestOfN
from pipelines.evaluation.summary import Metric, Summary
from pipelines.evaluation.tables import is_clear

CONTENT_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
KIND_SIGNS = "●■▲◆★✚▼◖⬟✱"
"""One sign for each kind of event, in order of their names; kinds beyond the last share it."""
SCORE_TITLES = {"class_f1": "class-aware onset F1", "mel_distance": "log-mel distance"}
ARROWS = {"up": "&#8593;", "down": "&#8595;"}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One event on a timeline: a true one or one that the detector heard."""

    time_s: float
    duration_s: float
    kind: str
    variant: str
    verdict: str
    """hit, right-time (found, but as something else), missed (a true one) or false (a heard one)."""


@dataclass(frozen=True, kw_only=True)
class PageSound:
    """One subject's sound of one clip."""

    label: str
    is_truth: bool
    video_mp4: bytes
    spectrogram_png: bytes
    true_marks: tuple[Mark, ...]
    heard_marks: tuple[Mark, ...]
    reward: tuple[float, float, float] | None
    """R, S_sem, S_tmp; None where it was not scored or was refused."""
    refused: str | None
    """Why the reward refused the sound."""
    offset_s: float | None
    notes: tuple[tuple[str, str], ...] = ()
    """More numbers as (name, value)."""


@dataclass(frozen=True, kw_only=True)
class PageClip:
    """One clip with all its sounds."""

    clip_id: str
    caption: str
    duration_s: float
    sounds: tuple[PageSound, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything the listening page shows."""

    title: str
    about: str
    choice: str
    """How the shown clips were chosen."""
    summary: Summary
    best_of_n: Mapping[str, BestOfN]
    plots_svg: Sequence[str]
    clips: Sequence[PageClip]
    lineage: Mapping[str, str]

    def to_html(self) -> str:
        """The page; needs no other file and makes no request."""
        signs = _signs(self.clips)
        plots = "".join(f'<div class="panel">{svg}</div>' for svg in self.plots_svg)
        links = "".join(
            f'<a href="#clip-{i}" title="{_text(clip.clip_id)}">{_text(clip.clip_id)}</a>'
            for i, clip in enumerate(self.clips)
        )
        lineage = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in self.lineage.items())
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(self.title)}</title><style>{CSS}</style></head>
<body><main>
<header><h1>{_text(self.title)}</h1><p class="soft">{_text(self.about)}</p></header>
<h2>Scores</h2>{_score_table(self.summary)}
{_best_of_n(self.best_of_n)}
<h2>Reward and independent score, clip by clip</h2><div class="plots">{plots}</div>
<h2>Listen</h2>{_guide(self.choice, signs)}
<nav>{links}</nav>
{"".join(_clip(i, clip, signs) for i, clip in enumerate(self.clips))}
<h2>Made from</h2><div class="panel"><dl class="lineage">{lineage}</dl></div>
</main><script>{SCRIPT}</script></body></html>
"""


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _signs(clips: Sequence[PageClip]) -> dict[str, str]:
    """Sign of each kind of event on the page; empty where no events are known."""
    marks = (m for clip in clips for sound in clip.sounds for m in (*sound.true_marks, *sound.heard_marks))
    kinds = sorted({mark.kind for mark in marks})
    return {kind: KIND_SIGNS[min(i, len(KIND_SIGNS) - 1)] for i, kind in enumerate(kinds)}


def _score_table(summary: Summary) -> str:
    head = "".join(f'<th title="{_text(m.meaning)}">{_text(m.title)} {ARROWS[m.better]}</th>' for m in summary.metrics)
    body = "".join(_score_row(summary, label) for label in summary.labels)
    return f"""<div class="panel scroll"><table><thead><tr><th>subject</th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
<p class="soft">{summary.num_clips} clips. Arrows: {ARROWS["up"]} more is better, {ARROWS["down"]} less is better.
Small: 95 % bootstrap interval over clips; below it the difference from {_text(summary.baseline)}, paired by clip
(same clips, same noise), green or red where its interval leaves out zero.
Column names explain themselves on hover.
{_text(" ".join(summary.cautions))}</p>"""


def _score_row(summary: Summary, label: str) -> str:
    invalid = summary.num_invalid[label]
    note = f'<span class="interval">{invalid} refused by the reward</span>' if invalid else ""
    cells = "".join(_score_cell(summary, label, metric) for metric in summary.metrics)
    return f"<tr><td><b>{_text(label)}</b>{note}</td>{cells}</tr>"


def _score_cell(summary: Summary, label: str, metric: Metric) -> str:
    value = summary.estimates[label].get(metric.name)
    if value is None:
        return '<td class="soft">&ndash;</td>'
    return (
        f'<td><b>{value.value:z.3f}</b><span class="interval">{value.lo:z.3f} &hellip; {value.hi:z.3f}</span>'
        f"{_difference(summary.differences.get(label, {}).get(metric.name), metric)}</td>"
    )


def _difference(difference: Estimate | None, metric: Metric) -> str:
    if difference is None:
        return ""
    kind = ""
    if is_clear(difference):
        kind = " good" if (difference.value > 0) == (metric.better == "up") else " bad"
    return (
        f'<span class="difference{kind}" title="{difference.lo:+z.3f} to {difference.hi:+z.3f}">'
        f"{difference.value:+z.3f}</span>"
    )


def _best_of_n(curves: Mapping[str, BestOfN]) -> str:
    if not curves:
        return ""
    counts = sorted({n for curve in curves.values() for n in curve.picked})
    head = "".join(f"<th>n = {n}</th>" for n in counts)
    rows = []
    for label, curve in curves.items():
        for name, points in (("picked by the reward", curve.picked), ("picked by the score itself", curve.oracle)):
            cells = "".join(_curve_cell(points.get(n)) for n in counts)
            rows.append(f'<tr><td><b>{_text(label)}</b> <span class="soft">{name}</span></td>{cells}</tr>')
    scores = " / ".join(sorted({SCORE_TITLES[curve.score] for curve in curves.values()}))
    return f"""<h2>Best of n candidates: can the reward choose?</h2><div class="panel scroll"><table><thead><tr>
<th>{_text(scores)} of the chosen one</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""


def _curve_cell(point: Estimate | None) -> str:
    if point is None:
        return '<td class="soft">&ndash;</td>'
    return f'<td><b>{point.value:z.3f}</b><span class="interval">{point.lo:z.3f} &hellip; {point.hi:z.3f}</span></td>'


def _guide(choice: str, signs: Mapping[str, str]) -> str:
    kinds = "".join(f"<span>{sign} {_text(kind)}</span>" for kind, sign in signs.items())
    marks = f"""{kinds}<span><i class="hit"></i>found</span>
<span><i class="right-time"></i>found at the right time as something else</span>
<span><i class="missed"></i>missed</span><span><i class="false"></i>heard, but not there</span>
<span>bars: true events, ticks: what the independent detector heard, a lane for each kind</span>"""
    return f"""<div class="panel"><p>{_text(choice)} Click a spectrogram to listen from there.
Keys: <kbd>1</kbd> &hellip; <kbd>9</kbd> play a sound of the clip in view, <kbd>n</kbd> <kbd>p</kbd> next and previous
clip.</p>
<div class="legend">{marks if signs else ""}</div></div>"""


def _clip(index: int, clip: PageClip, signs: Mapping[str, str]) -> str:
    cards = "".join(_card(i, sound, clip.duration_s, signs) for i, sound in enumerate(clip.sounds))
    caption = f'<span class="soft">&ldquo;{_text(clip.caption)}&rdquo;</span>' if clip.caption else ""
    return f"""<section class="clip panel" id="clip-{index}">
<div class="clip-head"><h3>{_text(clip.clip_id)}</h3>{caption}
<button class="in-turn" type="button">Play all in turn</button></div><div class="cards">{cards}</div></section>
"""


def _card(index: int, sound: PageSound, duration_s: float, signs: Mapping[str, str]) -> str:
    onsets = "".join(
        f'<span class="onset" style="left:{_percent(mark.time_s, duration_s)}"></span>' for mark in sound.true_marks
    )
    lanes = "".join(_lane(sound, kind, sign, duration_s) for kind, sign in signs.items())
    return f"""<div class="card{" truth" if sound.is_truth else ""}" data-duration="{duration_s:.6f}">
<div class="card-head"><b>{_text(sound.label)}</b><kbd>{index + 1}</kbd></div>
<video controls preload="metadata" playsinline src="{_data_uri("video/mp4", sound.video_mp4)}"></video>
<span class="broken"></span><div class="timeline">{lanes}
<img alt="spectrogram of {_text(sound.label)}" src="{_data_uri("image/png", sound.spectrogram_png)}">{onsets}
<span class="playhead"></span></div>{_numbers(sound)}</div>
"""


def _percent(time_s: float, duration_s: float) -> str:
    return f"{100 * min(max(time_s / duration_s, 0.0), 1.0):.2f}%"


def _lane(sound: PageSound, kind: str, sign: str, duration_s: float) -> str:
    """The events of one kind as bars, what was heard of it as ticks across them."""
    bars = (
        f'<span class="mark {m.verdict}" title="{_mark_title(m)}" style="left:{_percent(m.time_s, duration_s)};'
        f'width:{_percent(m.duration_s, duration_s)}">{sign}</span>'
        for m in sound.true_marks
        if m.kind == kind
    )
    ticks = (
        f'<span class="tick {m.verdict}" title="heard {_mark_title(m)}" style="left:{_percent(m.time_s, duration_s)}">'
        "</span>"
        for m in sound.heard_marks
        if m.kind == kind
    )
    return f'<div class="lane">{"".join(bars)}{"".join(ticks)}</div>'


def _mark_title(mark: Mark) -> str:
    return _text(f"{mark.kind} {mark.variant} at {mark.time_s:.2f} s: {mark.verdict.replace('-', ' ')}")


def _numbers(sound: PageSound) -> str:
    refusal = (
        "" if sound.refused is None else f'<div class="refused">refused by the reward: {_text(sound.refused)}</div>'
    )
    parts = [] if sound.reward is None else list(zip(("R", "S_sem", "S_tmp"), sound.reward, strict=True))
    spans = [f'<span><span class="soft">{name}</span>{value:+z.2f}</span>' for name, value in parts]
    notes = [] if sound.offset_s is None else [("best offset", f"{1000 * sound.offset_s:+.0f} ms")]
    spans += [
        f'<span class="wide"><span class="soft">{_text(name)}</span>{_text(value)}</span>'
        for name, value in (*notes, *sound.notes)
    ]
    return f'{refusal}<div class="numbers">{"".join(spans)}</div>'
