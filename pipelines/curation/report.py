"""Measures + features -> the page to look at before thresholds are chosen, with the media of its examples beside it."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.curation.page import QUANTILES, CurationPage, Example, Section, Spread
from pipelines.curation.predicates import filterable
from pipelines.data.contracts import MEASURES
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac
from pipelines.data.storage import Folder
from pipelines.data.store import Dataset
from pipelines.errors import InputError, MediaError
from pipelines.evaluation.plots import value_histogram
from pipelines.evaluation.shown_clips import row_groups_with
from pipelines.evaluation.spectrogram import mel_decibels, spectrogram_png

PAGE = "report/index.html"
MEDIA = "report/media"
SHEET_COLUMNS, SHEET_ROWS, SHEET_PX = 4, 2, 112
SHEET_QUALITY = 80
NO_VIDEO = np.full((1, SHEET_PX, SHEET_PX, 3), 64, np.uint8)
"""Shown of a clip that is sound alone: a grey sheet."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What the page shows."""

    num_examples: int = 3
    """Clips at each end of a measure."""

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise InputError(f"--num-examples must be at least 1, got {self.num_examples}")


def write_report(
    folder: Folder, features: Dataset, measures: Dataset, settings: ReportSettings, *, lineage: Mapping[str, str]
) -> list[str]:
    """Write `report/index.html` and its media into a folder; the names of the files.

    Args:
        folder: of the measures artifact.
        features: the clips, of which the examples are read.
        measures: their measures, at least one row.
        settings: what is shown.
        lineage: fingerprints to be shown by role.
    """
    schema = MEASURES.schema(measures.spec)
    table = measures.read(["clip_id", "split", *filterable(schema)])
    ends = {name: _ends(table, name, settings.num_examples) for name in filterable(schema)}
    shown = sorted({index for both in ends.values() for end in both for index in end})
    clip_ids = [table["clip_id"][index].as_py() for index in shown]
    found = dict(_write_examples(folder, features, clip_ids))
    examples = {index: found[clip_id] for index, clip_id in zip(shown, clip_ids, strict=True)}
    spreads = [spread for name in ends if (spread := _spread(table, name)) is not None]
    sections = [
        _section(table, spread, ends[spread.name], examples)
        for spread in spreads
        if spread.quantiles[0] < spread.quantiles[-1]
    ]
    page = CurationPage(
        about=f"spec {measures.spec.name}; {', '.join(f'{n} {split}' for split, n in sorted(measures.splits.items()))}",
        num_clips=table.num_rows,
        spreads=spreads,
        sections=sections,
        unknown=sorted(set(ends) - {spread.name for spread in spreads}),
        lineage=lineage,
    )
    folder.write_bytes(PAGE, page.to_html().encode())
    stems = sorted({media.stem for media in found.values() if media.stem is not None})
    return [PAGE, *(f"{MEDIA}/{stem}.{kind}" for stem in stems for kind in ("flac", "jpg", "png"))]


def _known(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Row indices and values of the clips that have a measure."""
    rows = np.flatnonzero(table[name].is_valid().to_numpy())
    return rows, table[name].fill_null(0).to_numpy().astype(np.float64)[rows]


def _ends(table: pa.Table, name: str, count: int) -> tuple[list[int], list[int]]:
    """Rows of the lowest and of the highest values, the outermost first; an end that most clips share is empty."""
    rows, values = _known(table, name)
    if not len(rows) or values.min() == values.max():
        return [], []
    # Rows are sorted by clip, and the sort is stable: ties are shown in order of the id.
    order = rows[np.argsort(values, kind="stable")]
    middle = np.quantile(values, 0.5, method="nearest")
    lowest = order[:count].tolist() if values.min() < middle else []
    highest = order[::-1][:count].tolist() if values.max() > middle else []
    return lowest, highest


def _spread(table: pa.Table, name: str) -> Spread | None:
    _, values = _known(table, name)
    if not len(values):
        return None
    quantiles = tuple(float(q) for q in np.quantile(values, QUANTILES))
    return Spread(name=name, meaning=MEASURES.column(name).doc, num_known=len(values), quantiles=quantiles)


def _section(
    table: pa.Table, spread: Spread, ends: tuple[list[int], list[int]], media: Mapping[int, "_Media"]
) -> Section:
    lowest, highest = (tuple(_example(table, spread.name, index, media[index]) for index in end) for end in ends)
    title = f"{spread.num_known} of {table.num_rows} clips; dotted: the median"
    return Section(
        spread=spread,
        histogram_svg=value_histogram(_known(table, spread.name)[1], spread.name, title),
        lowest=lowest,
        highest=highest,
    )


def _example(table: pa.Table, name: str, index: int, media: "_Media") -> Example:
    return Example(
        clip_id=table["clip_id"][index].as_py(),
        split=table["split"][index].as_py(),
        caption=media.caption,
        value=float(table[name][index].as_py()),
        media=media.stem,
        problem=media.problem,
    )


@dataclass(frozen=True, kw_only=True)
class _Media:
    """What of a clip can be shown."""

    caption: str
    stem: str | None
    problem: str | None = None


def _write_examples(folder: Folder, features: Dataset, clip_ids: Sequence[str]) -> Iterator[tuple[str, _Media]]:
    """Write the files of some clips, one row group in memory at a time."""
    wanted = set(clip_ids)
    columns = ["clip_id", "caption", "has_video", "frames", "audio"]
    for part, index, here in row_groups_with(features, wanted):
        table = features.read_row_group(part, index, columns)
        for row, clip_id in enumerate(here):
            if clip_id in wanted:
                clip = {name: table[name][row].as_py() for name in columns}
                yield clip_id, _write_example(folder, clip, features.spec.sample_rate_hz)


def _write_example(folder: Folder, clip: Mapping[str, Any], rate_hz: int) -> _Media:
    # A clip id may be any text: it does not become the name of a file.
    stem = hashlib.sha256(str(clip["clip_id"]).encode()).hexdigest()[:16]
    try:
        sheet = contact_sheet(decode_frames(clip["frames"]) if clip["has_video"] else NO_VIDEO)
        decibels = mel_decibels(decode_flac(clip["audio"]), rate_hz)
    except MediaError as error:
        return _Media(caption=str(clip["caption"]), stem=None, problem=str(error))
    folder.write_bytes(f"{MEDIA}/{stem}.jpg", sheet)
    folder.write_bytes(f"{MEDIA}/{stem}.png", spectrogram_png(decibels, float(decibels.max())))
    folder.write_bytes(f"{MEDIA}/{stem}.flac", clip["audio"])
    return _Media(caption=str(clip["caption"]), stem=stem)


def contact_sheet(frames: np.ndarray) -> bytes:
    """Frames uint8 [T, H, W, 3] -> a JPEG of eight of them, evenly over the clip, in two rows."""
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_PX, SHEET_ROWS * SHEET_PX))
    chosen = np.linspace(0, len(frames) - 1, SHEET_COLUMNS * SHEET_ROWS).round().astype(int)
    for place, index in enumerate(chosen):
        row, column = divmod(place, SHEET_COLUMNS)
        picture = Image.fromarray(frames[index]).resize((SHEET_PX, SHEET_PX))
        sheet.paste(picture, (column * SHEET_PX, row * SHEET_PX))
    sink = io.BytesIO()
    sheet.save(sink, "JPEG", quality=SHEET_QUALITY)
    return sink.getvalue()
