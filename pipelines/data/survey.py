"""What must be known of a file before its windows are planned: how long it is, how large, and where its scenes begin.

A resumable map of its own over files, not clips. A file is never rejected here: what cannot be opened or told is null,
and the worker that meets the file later says why. Cuts come from the whole file at 8 fps and 64 pixels, piece after
piece, so that memory does not grow with its length.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.spec import ClipSpec
from pipelines.data.commits import dataset_manifest
from pipelines.data.contracts import REJECTS, SURVEY
from pipelines.data.decoding import DecodeLimits, Decoder
from pipelines.data.entries import text_of
from pipelines.data.measures import CUT_PX, CutFinder, shrink
from pipelines.data.plan import FileSurvey
from pipelines.data.planned_units import write_plan
from pipelines.data.source import SourceReader
from pipelines.data.storage import open_folder
from pipelines.data.store import Dataset
from pipelines.data.tables import table_from_rows
from pipelines.data.units import Alive, Pool, Unit, run_units
from pipelines.data.window import FrameGrid, WindowRequest
from pipelines.errors import MediaError

RATE_HZ = 8
SIZE_PX = 64
PIECE_S = 60.0
FILES = "files"
"""Split of every file: units are cut by split."""
FILES_PER_UNIT = 16
"""Files committed together: whole films may be among them."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is known of one file; None where it could not be told."""

    length_s: float | None
    width: int | None
    height: int | None
    cuts_s: tuple[float, ...] | None
    """Beginnings of new scenes, seconds from the file's start, ascending; None where scenes were not asked for."""


NOTHING = FileFacts(length_s=None, width=None, height=None, cuts_s=None)


@dataclass(frozen=True, kw_only=True)
class SurveySettings:
    """What a survey looks at."""

    scenes: bool
    """Look for cuts, which decodes the whole picture; without, a file's header is enough."""
    max_pixels: int
    timeout_s: float
    """Of one piece of a file."""
    audio_only: bool = False
    """A file is as long as its sound."""


def survey_files(
    files: pa.Table, settings: SurveySettings, spec: ClipSpec, *, out: str, pool: Pool
) -> dict[str, FileSurvey]:
    """Survey the files of `plan.files_to_survey` into the folder `out`, and return what is known of each by `source`.

    Killed and called again it goes on where it was. The folder belongs to a stage whose fingerprint holds the
    settings; it has no manifest of its own.
    """
    planned = files.rename_columns({"source": "clip_id"}).append_column("split", pa.repeat(FILES, files.num_rows))
    run_units(
        write_plan(out, planned, _rows_of, unit_rows=FILES_PER_UNIT),
        pool,
        factory=partial(SurveyWorker, settings, spec),
        contract=SURVEY,
        spec=spec,
        out=out,
        label="files surveyed",
    )
    folder = open_folder(out)
    content = dataset_manifest(folder, SURVEY, spec)
    table = Dataset(folder, {**content, "fingerprint": ""}, SURVEY).read(["clip_id", "length_s", "cuts_s"])
    return {
        clip_id: FileSurvey(length_s=length_s, cuts_s=tuple(cuts_s or ()))
        for clip_id, length_s, cuts_s in zip(*(column.to_pylist() for column in table.columns), strict=True)
    }


def _rows_of(plan: pa.Table) -> Iterator[dict[str, Any]]:
    for row in plan.to_pylist():
        yield {**row, "uri": text_of(row["uri"])}


class SurveyWorker:
    """Surveys the files of units; lives as long as its actor."""

    def __init__(self, settings: SurveySettings, spec: ClipSpec, device: torch.device) -> None:
        """`spec` is that of the dataset; `device` is what a pool gives every worker, nothing here uses it."""
        self._settings = settings
        self._spec = spec
        self._decoder = Decoder(DecodeLimits(timeout_s=settings.timeout_s))
        self._sources = SourceReader()

    def close(self) -> None:
        """End the decode child."""
        self._sources.close()
        self._decoder.close()

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """A row for every file of the unit, and no rejects."""
        rows = []
        for row in unit.rows:
            rows.append({"clip_id": row["clip_id"], **vars(self.facts(row, alive))})
            alive()
        return table_from_rows(rows, SURVEY, self._spec), table_from_rows([], REJECTS, self._spec)

    def facts(self, row: Mapping[str, Any], alive: Alive) -> FileFacts:
        """What can be told of one file."""
        facts = NOTHING
        try:
            with self._sources.open(row["uri"], row["offset"], row["size_bytes"]) as media:
                info = self._decoder.probe(media.path, self._settings.max_pixels)
                facts = FileFacts(
                    length_s=info.sound_s if self._settings.audio_only else info.duration_s,
                    width=info.width if info.has_video else None,
                    height=info.height if info.has_video else None,
                    cuts_s=None,
                )
                if self._settings.scenes and info.has_video:
                    facts = replace(facts, cuts_s=self._cuts(media.path, info.duration_s, alive))
        except MediaError:
            # What was found until here stands.
            return facts
        return facts

    def _cuts(self, path: Path, length_s: float | None, alive: Alive) -> tuple[float, ...] | None:
        """Cuts of a whole file; None where none of its picture can be decoded, or where it kills the decoder."""
        cuts: list[float] = []
        finder, offset_s, decoded = CutFinder(RATE_HZ), 0.0, False
        for start_s, piece in self._pieces(path, length_s):
            alive()
            if piece is None:
                # What follows damage is not compared with what went before it.
                finder, offset_s = CutFinder(RATE_HZ), start_s + PIECE_S
                continue
            decoded = True
            cuts += [offset_s + index / RATE_HZ for index in finder.push(shrink(piece, CUT_PX))]
        return tuple(cuts) if decoded else None

    def _pieces(self, path: Path, length_s: float | None) -> Iterator[tuple[float, np.ndarray | None]]:
        """(start, frames uint8 [n, 64, 64, 3]) of piece after piece to the file's end; None for a damaged piece.

        Raises:
            MediaError: a piece hangs or kills the decoder: the rest of the file is not worth as long a wait.
        """
        start_s = 0.0
        while length_s is None or start_s < max(length_s, PIECE_S):
            try:
                window = self._decoder.decode(path, _request(start_s, self._settings.max_pixels))
            except MediaError as error:
                if error.reason != "truncated":
                    raise
                yield start_s, None
                if length_s is None:
                    return
            else:
                # Beyond the end the last frame is repeated: no cut, but time.
                yield start_s, window.frames[0][: math.ceil(window.valid_s * RATE_HZ)]
                if length_s is None and window.valid_s < PIECE_S - 1 / RATE_HZ:
                    return
            start_s += PIECE_S


def _request(start_s: float, max_pixels: int) -> WindowRequest:
    grid = FrameGrid(rate_hz=RATE_HZ, size_px=SIZE_PX, fit="stretch", num_frames=round(PIECE_S * RATE_HZ))
    return WindowRequest(
        start_s=start_s,
        duration_s=PIECE_S,
        grids=(grid,),
        audio_rate_hz=16_000,
        audio_samples=0,
        max_pixels=max_pixels,
        max_missing=1.0,
    )
