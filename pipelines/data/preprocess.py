"""Videos -> features: each window is decoded once, encoded by the frozen encoders, and becomes one row or one reject.

A worker sees one clip a call; while it encodes one, its decode child reads the next. The pictures that SF-CAVP will
see are the whole frame squeezed to a square (`stretch`): what sounds may be at the edge of the picture.
"""

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from models.codec import build_codec
from models.encoders import VideoGrid, build_encoders, check_encoders
from models.pretrained import codec_roles, encoder_roles
from models.spec import SPECS, ClipSpec
from pipelines.data.contracts import FEATURES, REJECTS
from pipelines.data.decoding import MAX_ATTEMPTS, RETRIED_REASONS, DecodeLimits, Decoder
from pipelines.data.manifest import Entries, plan_windows
from pipelines.data.media_write import encode_flac
from pipelines.data.sound import wave_of
from pipelines.data.source import LocalMedia, SourceReader
from pipelines.data.store import Dataset, dataset_manifest
from pipelines.data.tables import table_from_rows
from pipelines.data.units import Pool, Unit, cut_units, run_units
from pipelines.data.window import DecodedWindow, FrameGrid, WindowRequest
from pipelines.devices import own_device
from pipelines.errors import EnvironmentFailed, InputError, MediaError, Refused
from pipelines.frozen import FrozenNetworks, open_frozen
from pipelines.stage import StageContext, run_stage

STAGE = "preprocess"
METHOD = 2
"""Raised when the same options would give other bytes; part of the fingerprint."""
JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """How clips become rows."""

    spec: str
    encoders: str
    windows: Literal["first", "all"] = "first"
    hop_s: float | None = None
    max_pixels: int = 4096 * 2304
    timeout_s: float = 60.0
    """Of one clip's decoding; not part of the fingerprint, like all that depends on the machine."""
    weights: str | None = None
    """Folder of the frozen networks; what is in it enters the fingerprint, the place does not."""

    def __post_init__(self) -> None:
        if self.spec not in SPECS:
            raise InputError(f"no clip spec '{self.spec}'; known are {', '.join(SPECS)}")

    @property
    def clip_spec(self) -> ClipSpec:
        """The shapes of the rows."""
        return SPECS[self.spec]

    def fingerprinted(self) -> dict[str, Any]:
        """The settings that affect the bytes."""
        return {
            "spec": self.spec,
            "encoders": self.encoders,
            "windows": self.windows,
            "hop_s": self.hop_s if self.windows == "all" else None,
            "max_pixels": self.max_pixels,
            "method": METHOD,
        }


def preprocess(
    entries: Entries,
    settings: PreprocessSettings,
    *,
    out: str,
    pool: Pool,
    max_reject_rate: float = 0.05,
    options_yaml: str | None = None,
) -> Dataset:
    """Make the features dataset of a manifest or a folder, as a stage.

    Args:
        entries: what to process.
        settings: how.
        out: the artifact's folder.
        pool: who does it.
        max_reject_rate: rejected / all, `missing` not counted, above which the finished dataset is refused.
        options_yaml: kept as `config.yaml` beside the artifact.

    Raises:
        InputError: unknown encoders, missing networks, two entries of one key, a folder of another configuration.
        Refused: the dataset is complete, and more was rejected than allowed, or nothing is left.
    """
    frozen = find_networks(settings)
    run_stage(
        name=STAGE,
        config=settings.fingerprinted(),
        inputs={"manifest": entries.fingerprint, **frozen.as_input},
        out=out,
        body=partial(_run, entries=entries, settings=settings, frozen=frozen, pool=pool),
        version=FEATURES.version,
        options_yaml=options_yaml,
    )
    dataset = Dataset.open(out, FEATURES)
    refuse_rejects(dataset, max_reject_rate)
    return dataset


def find_networks(settings: PreprocessSettings) -> FrozenNetworks:
    """The frozen networks that the settings need; fails before any work starts, not in the first worker.

    Raises:
        InputError: unknown encoders, or of another spec, or a network is not there.
    """
    spec = settings.clip_spec
    try:
        check_encoders(settings.encoders, spec)
    except ValueError as error:
        raise InputError(f"--spec {settings.spec} --encoders {settings.encoders}: {error}") from error
    return open_frozen(settings.weights, (*codec_roles(spec, decoding=False), *encoder_roles(spec)))


def _run(
    context: StageContext, *, entries: Entries, settings: PreprocessSettings, frozen: FrozenNetworks, pool: Pool
) -> None:
    lengths = measure_lengths(entries, settings, max(pool.num_workers, 1)) if settings.windows == "all" else {}
    rows = plan_windows(
        entries.entries,
        clip_s=settings.clip_spec.duration_s,
        windows=settings.windows,
        hop_s=settings.hop_s,
        length_of=lambda entry: lengths.get(entry.uri),
    )
    units = cut_units([row.as_dict() for row in rows])
    work = partial(run_units, units, pool, contract=FEATURES, spec=settings.clip_spec, out=context.out, label="clips")
    if pool.num_workers == 0:
        with closing(ClipWorker(settings, frozen, own_device())) as worker:
            work(factory=lambda device: worker)
    else:
        work(factory=partial(ClipWorker, settings, frozen))
    content = dataset_manifest(context.folder, FEATURES, settings.clip_spec)
    if content["counts"]["in"] != len(rows):
        raise RuntimeError(f"{len(rows)} windows went in, {content['counts']['in']} came out or were rejected")
    content["counts"]["repeated"] = entries.num_repeated
    content["frozen"] = dict(frozen.sha256)
    made = Dataset(context.folder, {**content, "fingerprint": context.fingerprint}, FEATURES)
    shown = {f"reject/{reason}": count for reason, count in reject_counts(made).items()}
    context.tracker.metrics(0, {**content["counts"], **{f"clips/{k}": n for k, n in made.splits.items()}, **shown})
    context.finish(content)


def measure_lengths(entries: Entries, settings: PreprocessSettings, num_threads: int) -> dict[str, float]:
    """Seconds that each file holds, from its header; files that do not say, or cannot be opened, are left out."""
    uris = sorted({entry.uri for entry in entries.entries if entry.problem is None})
    shares = [uris[i::num_threads] for i in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(partial(_measure, settings=settings), shares)
    return {uri: length for share in found for uri, length in share.items()}


def _measure(uris: Sequence[str], settings: PreprocessSettings) -> dict[str, float]:
    lengths: dict[str, float] = {}
    sources = SourceReader()
    with Decoder(DecodeLimits(timeout_s=settings.timeout_s)) as decoder:
        for uri in uris:
            try:
                with sources.open(uri) as media:
                    length = decoder.probe(media.path, settings.max_pixels).duration_s
            except MediaError:
                # The worker that meets this file says why, in a reject.
                continue
            if length is not None:
                lengths[uri] = length
    return lengths


def refuse_rejects(dataset: Dataset, max_reject_rate: float) -> None:
    """The gate on rejects; `missing` files are counted but not held against the corpus.

    Raises:
        Refused: too many were rejected, or no row is left.
    """
    reasons = reject_counts(dataset)
    total, kept = dataset.manifest["counts"]["in"], dataset.manifest["counts"]["out"]
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    rejected = sum(count for reason, count in reasons.items() if reason != "missing")
    if kept == 0:
        raise Refused(f"{dataset.folder.uri}: none of {total} clips could be used ({listed}); see rejects/")
    if rejected > max_reject_rate * total:
        raise Refused(
            f"{dataset.folder.uri} is complete, but {rejected} of {total} clips were rejected ({listed}), more than "
            f"--max-reject-rate {max_reject_rate:g}; see rejects/, or allow it with a higher rate"
        )


def reject_counts(dataset: Dataset) -> dict[str, int]:
    """How many clips were rejected, by reason in alphabetical order."""
    return dict(sorted(Counter(dataset.read_rejects()["reason"].to_pylist()).items()))


class ClipWorker:
    """Decodes and encodes the clips of units; lives as long as its actor."""

    def __init__(self, settings: PreprocessSettings, frozen: FrozenNetworks, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._spec = settings.clip_spec
        self._encoders = build_encoders(settings.encoders, self._spec, device, frozen.folder)
        self._codec = build_codec(settings.spec, device, frozen.folder, decoding=False)
        self._frames = VideoGrid(
            rate_hz=self._spec.frames_rate_hz,
            size_px=self._spec.frames_px,
            fit="stretch",
        )
        self._grids = tuple(dict.fromkeys((self._frames, *self._encoders.grids)))
        self._decoder = Decoder(DecodeLimits(timeout_s=settings.timeout_s))
        self._sources = SourceReader()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def close(self) -> None:
        """End the decode child and the reading thread."""
        self._reader.shutdown()
        self._decoder.close()

    def process(self, unit: Unit) -> tuple[pa.Table, pa.Table]:
        """(features, rejects) of a unit; every row of the unit is in one of them."""
        rows, rejects = [], []
        for row, load in self._ahead(unit.rows):
            try:
                rows.append(self._make_row(row, *load()))
            except MediaError as error:
                rejects.append(_reject(row, error))
        return table_from_rows(rows, FEATURES, self._spec), table_from_rows(rejects, REJECTS, self._spec)

    def _ahead(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any], Callable[[], tuple[LocalMedia, DecodedWindow]]]]:
        """Each row with the call that gives its material; the next row is being read meanwhile."""
        coming = self._reader.submit(self._load, rows[0])
        for index, row in enumerate(rows):
            current = coming
            if index + 1 < len(rows):
                # One child, one thread: the next is queued behind the current one.
                coming = self._reader.submit(self._load, rows[index + 1])
            yield row, current.result

    def _load(self, row: Mapping[str, Any]) -> tuple[LocalMedia, DecodedWindow]:
        if row["problem"] is not None:
            raise MediaError(*row["problem"])
        request = WindowRequest(
            start_s=row["start_s"],
            duration_s=self._spec.duration_s,
            grids=tuple(frame_grid(grid, self._spec) for grid in self._grids),
            audio_rate_hz=self._spec.sample_rate_hz,
            audio_samples=self._spec.num_samples,
            max_pixels=self._settings.max_pixels,
        )
        with self._sources.open(row["uri"]) as media:
            return media, self._decoder.decode(media.path, request)

    def _make_row(self, row: Mapping[str, Any], media: LocalMedia, window: DecodedWindow) -> dict[str, Any]:
        wave = wave_of(window, self._spec.sample_rate_hz, self._spec.num_samples)
        frames = dict(zip(self._grids, window.frames, strict=True))
        return {
            "clip_id": row["clip_id"],
            "source": row["source"],
            "start_s": row["start_s"],
            "duration_s": self._spec.duration_s,
            "valid_s": window.valid_s,
            "caption": row["caption"],
            "split": row["split"],
            "content_hash": content_hash(media.sha256, row["start_s"], self._spec),
            "events": shift_events(row["events"], row["start_s"], self._spec.duration_s),
            "frames": [encode_jpeg(frame) for frame in frames[self._frames]],
            "audio": encode_flac(wave, self._spec.sample_rate_hz),
            **self._encode(frames, row["caption"], wave),
        }

    def _encode(self, frames: Mapping[VideoGrid, np.ndarray], caption: str, wave: np.ndarray) -> dict[str, np.ndarray]:
        """Conditions float16 and latents float32 of one clip."""
        try:
            values = self._encoders.encode(frames, caption)
            mean, std = self._codec.encode(torch.from_numpy(wave)[None].to(self._device))
        except torch.OutOfMemoryError as error:
            # The machine's fault and not the clip's: a reject would lose it.
            raise EnvironmentFailed(f"a worker's GPU is full ({error}); give fewer workers a GPU and resume") from error
        except (ValueError, RuntimeError) as error:
            raise MediaError("encoder_error", f"{type(error).__name__}: {error}") from error
        values = {**values, "latent_mean": mean[0].float().cpu().numpy(), "latent_std": std[0].float().cpu().numpy()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise MediaError("nonfinite", f"{name} is not finite")
        return values


def frame_grid(grid: VideoGrid, spec: ClipSpec) -> FrameGrid:
    """What the reader has to give for an encoder's grid."""
    return FrameGrid(
        rate_hz=grid.rate_hz,
        size_px=grid.size_px,
        fit=grid.fit,
        num_frames=grid.num_frames(spec.duration_s),
        scaler=grid.scaler,
    )


def content_hash(source_sha256: str, start_s: float, spec: ClipSpec) -> str:
    """sha256 of source bytes, window and spec: what the clip is, wherever it lies and whatever it is called."""
    fields = [source_sha256, start_s, dataclasses.asdict(spec)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def shift_events(
    events: Sequence[Mapping[str, Any]] | None, start_s: float, duration_s: float
) -> list[dict[str, Any]] | None:
    """Events of the file -> those that begin inside the window, in seconds from its start; None stays unknown."""
    if events is None:
        return None
    shifted = [{**event, "time_s": event["time_s"] - start_s} for event in events]
    return [event for event in shifted if 0 <= event["time_s"] < duration_s]


def encode_jpeg(frame: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB -> JPEG bytes."""
    sink = io.BytesIO()
    Image.fromarray(frame).save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()


def _reject(row: Mapping[str, Any], error: MediaError) -> dict[str, Any]:
    return {
        "clip_id": row["clip_id"],
        "stage": STAGE,
        "source": row["source"],
        "reason": error.reason,
        "detail": error.detail,
        "attempts": MAX_ATTEMPTS if error.reason in RETRIED_REASONS else 1,
    }
