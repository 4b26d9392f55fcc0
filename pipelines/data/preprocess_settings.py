"""What clips are made into: the options of preprocess that both the stage and its workers need."""

from dataclasses import dataclass
from typing import Any

from models.spec import SPECS, ClipSpec
from pipelines.data.plan import WindowChoice
from pipelines.errors import InputError

STAGE = "preprocess"
METHOD = 3
"""Raised when the same options would give other bytes; part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """How clips become rows."""

    spec: str
    encoders: str
    windows: WindowChoice = "first"
    hop_s: float | None = None
    audio_only: bool = False
    """Rows of sound and words: the picture of a file, if it has one, is not looked at."""
    max_pixels: int = 4096 * 2304
    max_file_s: float | None = None
    """Length of a file from which it is `too_long`; None: any."""
    timeout_s: float = 60.0
    """Of one clip's decoding; not part of the fingerprint, like all that depends on the machine."""
    weights: str | None = None
    """Folder of the frozen networks; what is in it enters the fingerprint, the place does not."""

    def __post_init__(self) -> None:
        if self.spec not in SPECS:
            raise InputError(f"no clip spec '{self.spec}'; known are {', '.join(SPECS)}")
        if self.audio_only and self.windows == "scenes":
            raise InputError("--windows scenes looks for cuts in the picture, which --audio-only leaves unseen")

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
            "hop_s": None if self.windows == "first" else self.hop_s,
            "audio_only": self.audio_only,
            "max_pixels": self.max_pixels,
            "max_file_s": self.max_file_s,
            "method": METHOD,
        }
