"""One clip after the other: decoded in a child, encoded by the frozen encoders, and made a row or a reject.

A worker sees one clip a call; while it encodes one, its decode child reads the next. The pictures that SF-CAVP will
see are the whole frame squeezed to a square (`stretch`): what sounds may be at the edge of the picture.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.codec import build_codec
from models.encoders import VideoGrid, build_encoders
from models.spec import ClipSpec
from pipelines.data.contracts import FEATURES, REJECTS
from pipelines.data.decoding import MAX_ATTEMPTS, RETRIED_REASONS, DecodeLimits, Decoder
from pipelines.data.frames import encode_jpeg
from pipelines.data.measures import measure_clip
from pipelines.data.media_write import encode_flac
from pipelines.data.preprocess_settings import STAGE, PreprocessSettings
from pipelines.data.sound import wave_of
from pipelines.data.source import SourceReader
from pipelines.data.tables import reject_row, table_from_rows
from pipelines.data.units import Alive, Unit
from pipelines.data.window import DecodedWindow, FrameGrid, WindowRequest
from pipelines.errors import EnvironmentFailed, MediaError
from pipelines.frozen import FrozenNetworks


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
        self._grids = () if settings.audio_only else tuple(dict.fromkeys((self._frames, *self._encoders.grids)))
        self._decoder = Decoder(DecodeLimits(timeout_s=settings.timeout_s))
        self._sources = SourceReader()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    @property
    def child_pid(self) -> int | None:
        """Process id of the living decode child, if there is one."""
        return self._decoder.child_pid

    def close(self) -> None:
        """End the decode child and the reading thread, and remove what was copied."""
        self._reader.shutdown()
        self._decoder.close()
        self._sources.close()

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """(features, rejects) of a unit; every row of the unit is in one of them."""
        rows, rejects = [], []
        for row, load in self._ahead(unit.rows):
            try:
                rows.append(self._make_row(row, *load()))
            except MediaError as error:
                rejects.append(_reject(row, error))
            alive()
        return table_from_rows(rows, FEATURES, self._spec), table_from_rows(rejects, REJECTS, self._spec)

    def _ahead(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any], Callable[[], tuple[str, DecodedWindow]]]]:
        """Each row with the call that gives its material; the next row is being read meanwhile."""
        coming = self._reader.submit(self._load, rows[0])
        for index, row in enumerate(rows):
            current = coming
            if index + 1 < len(rows):
                # One child, one thread: the next is queued behind the current one.
                coming = self._reader.submit(self._load, rows[index + 1])
            yield row, current.result

    def _load(self, row: Mapping[str, Any]) -> tuple[str, DecodedWindow]:
        """sha256 of the source and the window; the sound comes from a file of its own where the row names one.

        Without pictures a video whose sound lies in a file of its own is not opened at all.
        """
        if row["reason"] is not None:
            raise MediaError(row["reason"], row["detail"])
        request = WindowRequest(
            start_s=row["start_s"],
            duration_s=self._spec.duration_s,
            grids=tuple(frame_grid(grid, self._spec) for grid in self._grids),
            audio_rate_hz=self._spec.sample_rate_hz,
            audio_samples=self._spec.num_samples,
            max_pixels=self._settings.max_pixels,
            max_file_s=self._settings.max_file_s,
        )
        file = row["uri"], row["offset"], row["size_bytes"]
        beside = row["sound_uri"], row["sound_offset"], row["sound_size_bytes"]
        if row["sound_uri"] is None or self._settings.audio_only:
            with self._sources.open(*(file if row["sound_uri"] is None else beside)) as media:
                return media.sha256, self._decoder.decode(media.path, request)
        with self._sources.open(*file) as media:
            picture = self._decoder.decode(media.path, replace(request, audio_samples=0))
            sha256 = media.sha256
        with self._sources.open(*beside) as media:
            sound = self._decoder.decode(media.path, replace(request, grids=()))
            sha256 = hashlib.sha256(f"{sha256} {media.sha256}".encode()).hexdigest()
        heard = sound.source
        source = replace(picture.source, rate_hz=heard.rate_hz, channels=heard.channels)
        valid_s = min(picture.valid_s, sound.valid_s)
        return sha256, replace(sound, frames=picture.frames, valid_s=valid_s, source=source)

    def _make_row(self, row: Mapping[str, Any], source_sha256: str, window: DecodedWindow) -> dict[str, Any]:
        wave = wave_of(window, self._spec.sample_rate_hz, self._spec.num_samples)
        frames = dict(zip(self._grids, window.frames, strict=True))
        pictures = frames.get(self._frames)
        return {
            "clip_id": row["clip_id"],
            "source": row["source"],
            "start_s": row["start_s"],
            "duration_s": self._spec.duration_s,
            "valid_s": window.valid_s,
            "caption": row["caption"],
            "split": row["split"],
            "content_hash": content_hash(source_sha256, row["start_s"], self._spec),
            "events": shift_events(row["events"], row["start_s"], self._spec.duration_s),
            "has_video": pictures is not None,
            "frames": [] if pictures is None else [encode_jpeg(frame) for frame in pictures],
            "audio": encode_flac(wave, self._spec.sample_rate_hz),
            "measures": measure_clip(
                wave, self._spec.sample_rate_hz, pictures, self._spec.frames_rate_hz, window.source
            ),
            **self._encode(frames, row["caption"], wave),
        }

    def _encode(self, frames: Mapping[VideoGrid, np.ndarray], caption: str, wave: np.ndarray) -> dict[str, np.ndarray]:
        """Conditions float16 and latents float32 of one clip."""
        try:
            values = self._encoders.encode(frames, caption) if frames else self._encode_words(caption)
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

    def _encode_words(self, caption: str) -> dict[str, np.ndarray]:
        """The conditions of a clip without video: who reads `has_video` takes the nulls for the zeros."""
        spec = self._spec
        return {
            "clip_features": np.zeros((spec.clip_len, spec.clip_dim), np.float16),
            "sync_features": np.zeros((spec.sync_len, spec.sync_dim), np.float16),
            "text_features": self._encoders.encode_text(caption),
        }


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


def _reject(row: Mapping[str, Any], error: MediaError) -> dict[str, Any]:
    attempts = MAX_ATTEMPTS if error.reason in RETRIED_REASONS else 1
    return reject_row(row, STAGE, error, attempts=attempts)
