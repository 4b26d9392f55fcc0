"""A picture of some clips of a features dataset: a strip of frames and a spectrogram each, on one axis of time."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac
from pipelines.data.store import Dataset
from pipelines.evaluation.shown_clips import choose_clips, read_clips
from pipelines.evaluation.spectrogram import RANGE_DB, mel_decibels

COLUMNS = ("clip_id", "caption", "split", "events", "has_video", "frames", "audio", "duration_s", "valid_s")
STRIP_FRAMES = 10
CLIP_INCHES = (10.0, 1.9)


def contact_sheet(dataset: Dataset, num_clips: int, clip_ids: Sequence[str] = ()) -> bytes:
    """PNG of `num_clips` clips, those asked for first, the others by a hash of their ids; of some there is sound alone.

    Raises:
        InputError: a clip is not in the dataset.
    """
    known = dataset.read(["clip_id"])["clip_id"].to_pylist()
    chosen = choose_clips(known, num_clips, clip_ids)
    rows = read_clips(dataset, chosen, COLUMNS)
    width, height = CLIP_INCHES
    figure = Figure(figsize=(width, height * max(len(chosen), 1)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(max(2 * len(chosen), 1), 1, squeeze=False)[:, 0]
    for index, clip_id in enumerate(chosen):
        _draw(axes[2 * index], axes[2 * index + 1], rows[clip_id], dataset.spec.sample_rate_hz)
    sink = io.BytesIO()
    canvas.print_png(sink)
    return sink.getvalue()


def _draw(strip: Any, spectrum: Any, row: Mapping[str, Any], rate_hz: int) -> None:
    duration_s = row["duration_s"]
    if row["has_video"]:
        frames = decode_frames(row["frames"])
        shown = frames[np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)]
        strip.imshow(np.concatenate(list(shown), axis=1), aspect="auto", extent=(0, duration_s, 0, 1))
    else:
        strip.text(0.5, 0.5, "no video", ha="center", va="center", transform=strip.transAxes)
    strip.set_yticks([])
    strip.set_xticks([])
    strip.set_title(_title(row), fontsize=8, loc="left", parse_math=False)
    decibels = mel_decibels(decode_flac(row["audio"]), rate_hz)
    spectrum.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        extent=(0, duration_s, 0, 1),
        cmap=matplotlib.colormaps["magma"],
        vmin=decibels.max() - RANGE_DB,
        vmax=decibels.max(),
    )
    for event in row["events"] or ():
        spectrum.axvline(event["time_s"], color="white", linewidth=0.7, linestyle=":")
    spectrum.set_yticks([])
    spectrum.tick_params(labelsize=7)


def _title(row: Mapping[str, Any]) -> str:
    caption = " ".join(row["caption"].split())
    padded = "" if row["valid_s"] >= row["duration_s"] else f", {row['valid_s']:.2f} s real"
    return f"{row['clip_id']}  [{row['split']}{padded}]  {caption}"[:150]
