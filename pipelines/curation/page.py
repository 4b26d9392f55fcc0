"""The page of a measures dataset as HTML: how every measure is spread, and clips from both ends to look at and hear.

Pure composition of strings from plain values; everything that came from outside (clip ids, captions, problems) is
escaped. Pictures and sounds are files beside the page, named by it: of 44 kHz clips they are too many to be inline.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.evaluation.page_style import CSS

CONTENT_POLICY = "default-src 'none'; img-src 'self' data:; media-src 'self'; style-src 'unsafe-inline'"
MORE_CSS = """
.measure { margin-top: 18px; scroll-margin-top: 12px; }
.measure > p { max-width: 90ch; }
.ends { display: grid; grid-template-columns: minmax(260px, 2fr) 3fr 3fr; gap: 18px; align-items: start; }
.ends svg { width: 100%; height: auto; display: block; }
.end h4 { margin: 0 0 8px; font-size: 13px; color: var(--soft); font-weight: 600; }
.end .examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 10px; }
.example { border: 1px solid var(--line); border-radius: 8px; padding: 8px; min-width: 0; font-size: 12px; }
.example img { width: 100%; display: block; border-radius: 4px; }
.example img.sound { height: 64px; margin-top: 4px; background: #000004; }
.example audio { width: 100%; height: 30px; margin-top: 6px; }
.example .value { font-size: 15px; font-weight: 600; font-variant-numeric: tabular-nums; }
.example .id { font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
td a { color: var(--accent); text-decoration: none; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
td.meaning { text-align: left; white-space: normal; min-width: 26ch; }
@media (max-width: 1100px) { .ends { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One clip at an end of a measure."""

    clip_id: str
    split: str
    caption: str
    value: float
    media: str | None
    """Stem of its files below `media/`; None where the stored media cannot be read."""
    problem: str | None = None
    """Why there are none."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measure of at least one clip, in numbers."""

    name: str
    meaning: str
    num_known: int
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
HEADS = ("least", "5 %", "25 %", "median", "75 %", "95 %", "greatest")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A measure that differs among clips, with its pictures."""

    spread: Spread
    histogram_svg: str
    lowest: tuple[Example, ...]
    """Empty where half of the clips and more have the least value."""
    highest: tuple[Example, ...]
    """Empty where half of the clips and more have the greatest value."""


@dataclass(frozen=True, kw_only=True)
class CurationPage:
    """Everything the page shows."""

    about: str
    num_clips: int
    spreads: Sequence[Spread]
    sections: Sequence[Section]
    unknown: Sequence[str]
    """Measures that no clip has."""
    lineage: Mapping[str, str]

    def to_html(self) -> str:
        """The page; it asks for nothing but the files of its examples."""
        linked = {section.spread.name for section in self.sections}
        rows = "".join(_spread_row(spread, spread.name in linked) for spread in self.spreads)
        heads = "".join(f"<th>{_text(head)}</th>" for head in ("known", *HEADS))
        unknown = f"<p>Not known of any clip: {_text(', '.join(self.unknown))}.</p>" if self.unknown else ""
        lineage = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in self.lineage.items())
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Measures of a dataset</title><style>{CSS}{MORE_CSS}</style></head>
<body><main>
<header><h1>Measures of {self.num_clips} clips</h1><p class="soft">{_text(self.about)}</p></header>
<h2>Where the clips lie</h2><div class="panel scroll"><table><thead><tr><th>measure</th>{heads}<th></th></tr></thead>
<tbody>{rows}</tbody></table>{unknown}</div>
<p class="soft">A filter is written with these names: <code>python jobs/curate.py --keep "loudness_lufs &gt;= -50"
"abs(offset_s) &lt;= 0.2" ...</code>, and nothing is decoded again when a threshold changes.</p>
<h2>Both ends</h2>
{"".join(_section(section) for section in self.sections)}
<h2>Made from</h2><div class="panel"><dl class="lineage">{lineage}</dl></div>
</main></body></html>
"""


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _spread_row(spread: Spread, is_linked: bool) -> str:
    name = f'<a href="#{_text(spread.name)}">{_text(spread.name)}</a>' if is_linked else _text(spread.name)
    cells = "".join(f"<td>{shown(value)}</td>" for value in spread.quantiles)
    meaning = f'<td class="meaning soft">{_text(spread.meaning)}</td>'
    return f"<tr><td>{name}</td><td>{spread.num_known}</td>{cells}{meaning}</tr>\n"


def shown(value: float) -> str:
    """A number in four figures, or whole where it is large."""
    return f"{value:z.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _section(section: Section) -> str:
    name = section.spread.name
    ends = _end("lowest", section.lowest, "least") + _end("highest", section.highest, "greatest")
    return f"""<section class="measure panel" id="{_text(name)}"><h3>{_text(name)}</h3>
<p class="soft">{_text(section.spread.meaning)}</p><div class="ends"><div>{section.histogram_svg}</div>{ends}</div>
</section>
"""


def _end(title: str, examples: Sequence[Example], extreme: str) -> str:
    if not examples:
        return f'<div class="end"><h4>{title}</h4><p class="soft">Most clips have the {extreme} value.</p></div>'
    cards = "".join(_card(example) for example in examples)
    return f'<div class="end"><h4>{title}</h4><div class="examples">{cards}</div></div>'


def _card(example: Example) -> str:
    caption = f'<div class="soft">&ldquo;{_text(example.caption)}&rdquo;</div>' if example.caption else ""
    return f"""<div class="example"><div class="value">{shown(example.value)}</div>
<div class="id">{_text(example.clip_id)} <span class="soft">{_text(example.split)}</span></div>{caption}
{_media(example)}</div>
"""


def _media(example: Example) -> str:
    if example.media is None:
        return f'<div class="refused">cannot be shown: {_text(example.problem or "")}</div>'
    stem = _text(f"media/{example.media}")
    return (
        f'<img loading="lazy" alt="frames of the clip" src="{stem}.jpg">'
        f'<img class="sound" loading="lazy" alt="spectrogram of the clip" src="{stem}.png">'
        f'<audio controls preload="none" src="{stem}.flac"></audio>'
    )
