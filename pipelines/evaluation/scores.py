"""A scores dataset as arrays over clips, and the check that several of them cover the same clips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa

from pipelines.errors import ContractError, InputError


@dataclass(frozen=True, kw_only=True)
class ClipScores:
    """The numbers of one scores dataset as arrays over clips, sorted by `clip_id`; missing values are NaN."""

    clip_ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    """Scalar columns, each float64 [clips]."""
    candidates: dict[str, np.ndarray]
    """Fields of the candidates, each float64 [clips, N]."""
    statistics: np.ndarray
    """Audio statistics of the scored sound, float64 [clips, D]."""
    truth_statistics: np.ndarray
    """The same of the real sound."""
    codec_statistics: np.ndarray | None = None
    """The same of the real sound after the codec, once `beside_codec` has joined them."""

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read a scores table; raises `ContractError` where clips have unequal numbers of candidates."""
        table = table.sort_by("clip_id")
        clip_ids = tuple(table["clip_id"].to_pylist())
        reward = _fields(table["reward"].combine_chunks())
        scalars = {f.name: _floats(table[f.name]) for f in table.schema if _is_number(f.type) and f.name != "seed"}
        for name, part in (("reward", "total"), ("reward_semantic", "semantic"), ("reward_temporal", "temporal")):
            scalars[name] = _floats(reward[part])
        counts = set(table["candidates"].combine_chunks().value_lengths().to_pylist())
        if len(counts) > 1:
            raise ContractError(
                f"scores: clips have {sorted(counts)} candidates; evaluate all clips with one --num-candidates"
            )
        return cls(
            clip_ids=clip_ids,
            values=scalars,
            candidates=_candidate_fields(table["candidates"], len(clip_ids)),
            statistics=np.array(table["statistics"].to_pylist(), np.float64),
            truth_statistics=np.array(table["truth_statistics"].to_pylist(), np.float64),
        )

    def beside_codec(self, codec: "ClipScores") -> Self:
        """These scores and, for distances, the statistics of an evaluation of the real sounds after the codec.

        Raises InputError where that is not of exactly the same clips.
        """
        check_same_clips({"those given": self, "those of the codec": codec})
        return replace(self, codec_statistics=codec.statistics)

    def of_clips(self, clip_ids: Sequence[str]) -> Self:
        """The same of some of the clips; raises InputError where one of them was not scored."""
        wanted = tuple(sorted(set(clip_ids)))
        if lacking := set(wanted) - set(self.clip_ids):
            raise InputError(f"not scored: {len(lacking)} of the clips, such as {min(lacking)!r}")
        at = np.searchsorted(self.clip_ids, wanted)
        codec = self.codec_statistics
        return replace(
            self,
            clip_ids=wanted,
            values={name: value[at] for name, value in self.values.items()},
            candidates={name: value[at] for name, value in self.candidates.items()},
            statistics=self.statistics[at],
            truth_statistics=self.truth_statistics[at],
            codec_statistics=None if codec is None else codec[at],
        )

    @property
    def num_clips(self) -> int:
        """Clips scored."""
        return len(self.clip_ids)

    @property
    def num_candidates(self) -> int:
        """Candidates a clip."""
        return self.candidates["total"].shape[1]

    @property
    def num_invalid(self) -> int:
        """Clips whose sound the reward refuses (silent, clipped, not finite)."""
        return int(np.isnan(self.values["reward"]).sum())

    @property
    def has_events(self) -> bool:
        """Whether any clip has known events; without them there is no onset F1."""
        return bool(np.isfinite(self.values["num_events"]).any())


def check_same_clips(scores: Mapping[str, ClipScores]) -> None:
    """Raise `InputError` unless every subject has exactly the same clips."""
    labels = list(scores)
    first = set(scores[labels[0]].clip_ids)
    for label in labels[1:]:
        extra, lacking = set(scores[label].clip_ids) - first, first - set(scores[label].clip_ids)
        if extra or lacking:
            example = min(extra | lacking)
            raise InputError(
                f"scores {label!r} and {labels[0]!r} differ in their clips: {len(lacking)} lacking, {len(extra)} more, "
                f"such as {example!r}; evaluate both on the same features and split"
            )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _floats(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(math.nan).to_numpy(zero_copy_only=False)


def _fields(structs: pa.StructArray) -> dict[str, pa.Array]:
    """The fields of an array of structs; a field of a null struct is null (`flatten`, unlike `field`, sees to it)."""
    return dict(zip([field.name for field in structs.type], structs.flatten(), strict=True))


def _candidate_fields(column: pa.ChunkedArray, num_clips: int) -> dict[str, np.ndarray]:
    fields = _fields(column.combine_chunks().flatten())
    return {name: _floats(values).reshape(num_clips, -1) for name, values in fields.items() if name != "seed"}
