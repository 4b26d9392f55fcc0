"""What must hold of a dataset whatever lay in the folder: every file is told of once, and what was taken is whole."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from models.spec import ClipSpec
from pipelines.data.contracts import FEATURES, REJECT_REASONS
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac
from pipelines.data.store import Dataset
from pipelines.data.tables import conform
from pipelines.data.window import WindowRequest
from pipelines.errors import ContractError

MAX_MISSING = WindowRequest.__dataclass_fields__["max_missing"].default
OWN_FAULTS = ("decoder_crash", "encoder_error")
DEATHS = ("the decoder died", "more than")
"""How a detail begins where the child was lost; any other `decoder_crash` is an exception that our code let through."""


def breaches(dataset: Dataset, stems: Collection[str]) -> list[str]:
    """Everything that is wrong with the dataset of a folder of files of these stems; empty when all holds."""
    rows = dataset.read()
    rejects = dataset.read_rejects().to_pylist()
    found = _accounting(rows["clip_id"].to_pylist(), [r["clip_id"] for r in rejects], stems, dataset.manifest["counts"])
    found += [problem for reject in rejects for problem in _reject_problems(reject)]
    try:
        kept = conform(rows, FEATURES, dataset.spec).to_pylist()
    except ContractError as error:
        return [*found, str(error)]
    return found + [problem for row in kept for problem in _row_problems(row, dataset.spec)]


def stem_of(clip_id: str) -> str:
    """The file's stem of a key, with or without a window's start."""
    return clip_id.partition("#")[0]


def _accounting(taken: list[str], rejected: list[str], stems: Collection[str], counts: Mapping[str, int]) -> list[str]:
    twice = [clip for clip, count in Counter(taken + rejected).items() if count > 1]
    told = {stem_of(clip) for clip in taken + rejected}
    problems = [f"{clip} is told of more than once" for clip in twice]
    problems += [f"{stem} is in neither features nor rejects" for stem in sorted(set(stems) - told)]
    problems += [f"{stem} was never given" for stem in sorted(told - set(stems))]
    if (counts["in"], counts["out"], counts["rejected"]) != (len(taken) + len(rejected), len(taken), len(rejected)):
        problems.append(f"the manifest counts {counts}, there are {len(taken)} rows and {len(rejected)} rejects")
    return problems


def _reject_problems(reject: Mapping[str, Any]) -> list[str]:
    clip, reason, detail = reject["clip_id"], reject["reason"], reject["detail"]
    if reason not in REJECT_REASONS:
        return [f"{clip}: reason '{reason}' is not in the closed list"]
    if reason in OWN_FAULTS and not detail.startswith(DEATHS):
        return [f"{clip}: nobody foresaw: {reason}, {detail}"]
    return []


def _row_problems(row: Mapping[str, Any], spec: ClipSpec) -> list[str]:
    found = []
    if row["duration_s"] != spec.duration_s or row["start_s"] < 0:
        found.append(f"window of {row['duration_s']} s at {row['start_s']} s")
    if not (1 - MAX_MISSING) * spec.duration_s - 1e-6 <= row["valid_s"] <= spec.duration_s:
        found.append(f"valid_s is {row['valid_s']}")
    shape = decode_frames(row["frames"]).shape
    if shape != (spec.frames_len, spec.frames_px, spec.frames_px, 3):
        found.append(f"frames are {shape}")
    wave = decode_flac(row["audio"])
    if len(wave) != spec.num_samples or not wave.any():
        found.append(f"sound has {len(wave)} samples with a peak of {abs(wave).max()}")
    return [f"{row['clip_id']}: {problem}" for problem in found]
