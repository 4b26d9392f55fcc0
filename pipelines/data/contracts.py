"""The only definition of a row: versioned Parquet schemas whose lengths and widths come from `ClipSpec`.

Tensors are Arrow's canonical `fixed_shape_tensor`, so plain pyarrow, pandas, DuckDB and Ray all read them. Tensor
columns are never null: Arrow cannot read a null fixed-size list back from Parquet.
Every writer ends in `tables.conform`; a breach names the column and the clip.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from models.spec import ClipSpec
from pipelines.data.measured import MEASURE_STRUCT, MEASURED
from pipelines.errors import ContractError

REJECT_REASONS = (
    "missing",
    "bad_uri",
    "not_media",
    "empty",
    "truncated",
    "no_video",
    "no_audio",
    "too_short",
    "too_long",
    "too_large",
    "silent",
    "clipped",
    "unsupported_codec",
    "timeout",
    "decoder_crash",
    "nonfinite",
    "encoder_error",
    "filtered",
)
SPLITS = ("train", "rpo", "val", "test")

REWARD_STRUCT = pa.struct(
    [("total", pa.float32()), ("semantic", pa.float32()), ("temporal", pa.float32())],
)
EVENT_STRUCT = pa.struct(
    [("time_s", pa.float64()), ("duration_s", pa.float64()), ("kind", pa.string()), ("variant", pa.string())],
)

CANDIDATE_STRUCT = pa.struct(
    [
        ("seed", pa.int64()),
        ("total", pa.float32()),
        ("semantic", pa.float32()),
        ("temporal", pa.float32()),
        ("num_detected", pa.int32()),
        ("num_matched", pa.int32()),
        ("num_class_matched", pa.int32()),
        ("mel_distance", pa.float32()),
    ],
)


def tensor_type(dtype: pa.DataType, *shape: int) -> pa.FixedShapeTensorType:
    """The canonical Arrow tensor type of one row's value of `shape`."""
    return pa.fixed_shape_tensor(dtype, shape)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its name, its Arrow type for a given spec, what it means, and two flags."""

    name: str
    type: Callable[[ClipSpec], pa.DataType]
    doc: str
    nullable: bool = False
    in_digest: bool = True
    """False for what names a place (a path), so that moved data keep their digest."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A named, versioned table: `key` columns identify a row."""

    name: str
    version: int
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    doc: str

    def schema(self, spec: ClipSpec) -> pa.Schema:
        """Arrow schema for clips of `spec`; the metadata carry contract, version and spec."""
        fields = [pa.field(c.name, c.type(spec), nullable=c.nullable) for c in self.columns]
        return pa.schema(fields, metadata={"contract": f"{self.name}/{self.version}", "spec": spec.name})

    def column(self, name: str) -> Column:
        """The column called `name`; raises ContractError when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise ContractError(f"contract {self.name} has no column '{name}'; it has {[c.name for c in self.columns]}")


def _plain(dtype: pa.DataType) -> Callable[[ClipSpec], pa.DataType]:
    return lambda spec: dtype


def _latent(spec: ClipSpec) -> pa.DataType:
    return tensor_type(pa.float32(), spec.latent_len, spec.latent_dim)


_CLIP_ID = Column(
    name="clip_id",
    type=_plain(pa.string()),
    doc="key: the file's stem (NFC, escaped), with `#<start in ms>` where a file gives more than one window",
)
_CONDITIONS = (
    Column(
        name="clip_features",
        type=lambda s: tensor_type(pa.float16(), s.clip_len, s.clip_dim),
        doc="semantic video condition [Lc, Dc]: CLIP image embeddings at 8 fps, or grid statistics (tiny)",
    ),
    Column(
        name="sync_features",
        type=lambda s: tensor_type(pa.float16(), s.sync_len, s.sync_dim),
        doc="timing condition [Ls, Ds]: Synchformer segments, or grids with their differences (tiny)",
    ),
    Column(
        name="text_features",
        type=lambda s: tensor_type(pa.float16(), s.text_len, s.text_dim),
        doc="caption condition [Lt, Dt]: CLIP text hidden states, or hashed word vectors (tiny)",
    ),
)

FEATURES = Contract(
    name="features",
    version=3,
    key=("clip_id",),
    doc="One row is one clip: its identity, the material SF-CAVP sees, the generator's conditions and target.",
    columns=(
        _CLIP_ID,
        Column(name="source", type=_plain(pa.string()), doc="path or URI of the media file", in_digest=False),
        Column(name="start_s", type=_plain(pa.float64()), doc="start of the window in the file, seconds"),
        Column(name="duration_s", type=_plain(pa.float64()), doc="length of the window, seconds"),
        Column(
            name="valid_s",
            type=_plain(pa.float64()),
            doc="how much of the window is real; the rest is padding",
        ),
        Column(name="caption", type=_plain(pa.string()), doc="caption as given, may be empty"),
        Column(name="split", type=_plain(pa.string()), doc="train, rpo, val or test"),
        Column(
            name="content_hash",
            type=_plain(pa.string()),
            doc="sha256 of source bytes, window and spec: identity, not key",
        ),
        Column(
            name="events",
            type=_plain(pa.list_(EVENT_STRUCT)),
            doc="known sounding events of the window, where the corpus knows them",
            nullable=True,
        ),
        Column(
            name="has_video",
            type=_plain(pa.bool_()),
            doc="false for sound and words alone: no frames, zeros for `clip_features` and `sync_features`",
        ),
        Column(
            name="frames",
            type=_plain(pa.list_(pa.binary())),
            doc="JPEG frames at 16 fps, square, for SF-CAVP; none where there is no video",
        ),
        Column(name="audio", type=_plain(pa.binary()), doc="FLAC, 16 bit, mono, the codec's rate, exact length"),
        Column(
            name="measures",
            type=_plain(MEASURE_STRUCT),
            doc="what curation filters by: level, loudness, silence, motion, cuts (see the dataset of measures); "
            "those of the picture are null without video",
        ),
        *_CONDITIONS,
        Column(name="latent_mean", type=_latent, doc="posterior mean of the codec's latents [N, C]"),
        Column(name="latent_std", type=_latent, doc="posterior standard deviation [N, C], 0 for a fixed codec"),
    ),
)

REJECTS = Contract(
    name="rejects",
    version=1,
    key=("clip_id", "stage"),
    doc="One row is one clip that a stage could not use, with its reason.",
    columns=(
        _CLIP_ID,
        Column(name="stage", type=_plain(pa.string()), doc="the stage that rejected the clip"),
        Column(name="source", type=_plain(pa.string()), doc="path or URI of the media file", in_digest=False),
        Column(name="reason", type=_plain(pa.string()), doc=f"one of: {', '.join(REJECT_REASONS)}"),
        Column(name="detail", type=_plain(pa.string()), doc="what exactly was found", in_digest=False),
        Column(name="attempts", type=_plain(pa.int32()), doc="how often it was tried", in_digest=False),
    ),
)

PAIRS = Contract(
    name="pairs",
    version=1,
    key=("clip_id",),
    doc="One row is one preference pair with the conditions to train on and every candidate's scores.",
    columns=(
        _CLIP_ID,
        *_CONDITIONS,
        Column(name="winner", type=_latent, doc="latents of the preferred sound [N, C]"),
        Column(name="loser", type=_latent, doc="latents of the other sound [N, C]"),
        Column(
            name="winner_origin",
            type=_plain(pa.string()),
            doc="`ground_truth` or the candidate's index as `candidate_<i>`",
        ),
        Column(
            name="loser_origin",
            type=_plain(pa.string()),
            doc="`candidate_<i>` or `distorted_<kind>`",
        ),
        Column(
            name="rewards",
            type=_plain(pa.list_(REWARD_STRUCT)),
            doc="scores of ALL candidates in order of index; null where a candidate was invalid",
        ),
        Column(
            name="reward_ground_truth",
            type=_plain(REWARD_STRUCT),
            doc="score of the real sound through the same path",
            nullable=True,
        ),
        Column(name="seeds", type=_plain(pa.list_(pa.int64())), doc="seed of each candidate's noise"),
        Column(name="margin", type=_plain(pa.float32()), doc="R(winner) - R(loser)", nullable=True),
        Column(name="kept", type=_plain(pa.bool_()), doc="whether the pair is trained on"),
        Column(name="drop_reason", type=_plain(pa.string()), doc="why it is not, null when kept", nullable=True),
        Column(name="policy", type=_plain(pa.string()), doc="fingerprint of the policy that sampled"),
        Column(name="reward_model", type=_plain(pa.string()), doc="fingerprint of the reward that ranked"),
        Column(name="round", type=_plain(pa.int32()), doc="round number, from 0"),
    ),
)

DEGRADED = Contract(
    name="degraded",
    version=1,
    key=("clip_id",),
    doc="One row is one clip and what a policy makes of its sound when it starts from less and less of it: what "
    "SF-CAVP learns to rank.",
    columns=(
        _CLIP_ID,
        Column(name="frames", type=_plain(pa.list_(pa.binary())), doc="JPEG frames at 16 fps, as in features"),
        Column(
            name="audio",
            type=_plain(pa.binary()),
            doc="FLAC of the real sound through the codec, as every version of it has gone",
        ),
        Column(
            name="worse",
            type=_plain(pa.list_(pa.binary())),
            doc="FLAC of the versions, each worse than the one before it",
        ),
        Column(
            name="starts",
            type=_plain(pa.list_(pa.float32())),
            doc="where on the path from noise (0) to the real latents (1) the policy started each version",
        ),
        Column(name="seeds", type=_plain(pa.list_(pa.int64())), doc="seed of each version's noise"),
        Column(name="latent_mean", type=_latent, doc="the real sound's latents [N, C], as in features"),
        Column(name="policy", type=_plain(pa.string()), doc="fingerprint of the policy"),
    ),
)

SCORES = Contract(
    name="scores",
    version=1,
    key=("clip_id",),
    doc="One row is what one model made for one clip, and every per-clip measure of it.",
    columns=(
        _CLIP_ID,
        Column(name="split", type=_plain(pa.string()), doc="split of the clip"),
        Column(name="seed", type=_plain(pa.int64()), doc="seed of the noise"),
        Column(name="reward", type=_plain(REWARD_STRUCT), doc="R and its two parts", nullable=True),
        Column(name="offset_s", type=_plain(pa.float32()), doc="best offset by SF-CAVP, seconds", nullable=True),
        Column(
            name="invalid_reason",
            type=_plain(pa.string()),
            doc="why the reward refused the sound (silent, clipped, nonfinite); null when it did not",
            nullable=True,
        ),
        Column(
            name="num_events",
            type=_plain(pa.int32()),
            doc="known events; null where the corpus knows none",
            nullable=True,
        ),
        Column(name="num_detected", type=_plain(pa.int32()), doc="onsets the detector heard", nullable=True),
        Column(name="num_matched", type=_plain(pa.int32()), doc="matched within 100 ms", nullable=True),
        Column(
            name="num_class_matched",
            type=_plain(pa.int32()),
            doc="matched within 100 ms with the right kind and variant",
            nullable=True,
        ),
        Column(name="mel_distance", type=_plain(pa.float32()), doc="mean |log-mel difference| to the real sound"),
        Column(
            name="statistics",
            type=_plain(pa.list_(pa.float32())),
            doc="simple audio statistics for the Frechet distance",
        ),
        Column(
            name="truth_statistics",
            type=_plain(pa.list_(pa.float32())),
            doc="the same statistics of the real sound",
        ),
        Column(
            name="diversity",
            type=_plain(pa.float32()),
            doc="mean pairwise log-mel distance among the candidates",
            nullable=True,
        ),
        Column(
            name="fm_loss",
            type=_plain(pa.float32()),
            doc="flow-matching error of the policy on the clip's real sound; null where no policy is scored",
            nullable=True,
        ),
        Column(
            name="candidates",
            type=_plain(pa.list_(CANDIDATE_STRUCT)),
            doc="seed, rewards and independent measures of every candidate; the first is the row's own sound",
        ),
        Column(name="audio", type=_plain(pa.binary()), doc="FLAC of what was generated"),
    ),
)

SURVEY = Contract(
    name="survey",
    version=1,
    key=("clip_id",),
    doc="One row is one media file, surveyed before its windows are planned; what cannot be opened or told is null.",
    columns=(
        Column(
            name="clip_id",
            type=_plain(pa.string()),
            doc="key: the escaped address of the file, `<tar>!/<member>` for a member of a tar",
        ),
        Column(name="length_s", type=_plain(pa.float64()), doc="seconds the file holds", nullable=True),
        Column(name="width", type=_plain(pa.int32()), doc="width of the picture, pixels", nullable=True),
        Column(name="height", type=_plain(pa.int32()), doc="height of the picture, pixels", nullable=True),
        Column(
            name="cuts_s",
            type=_plain(pa.list_(pa.float64())),
            doc="when each new scene begins, seconds from the file's start; null where scenes were not asked for",
            nullable=True,
        ),
    ),
)

MEASURES = Contract(
    name="measures",
    version=1,
    key=("clip_id",),
    doc="One row is one clip of a features dataset with everything it can be filtered by; null of the picture without "
    "video.",
    columns=(
        _CLIP_ID,
        Column(name="split", type=_plain(pa.string()), doc="split of the clip"),
        Column(name="valid_s", type=_plain(pa.float64()), doc="how much of the clip is real, seconds"),
        *(Column(name=name, type=_plain(kind), doc=doc, nullable=True) for name, kind, doc in MEASURED),
        Column(
            name="semantic",
            type=_plain(pa.float32()),
            doc="does the sound belong to the picture: similarity of SF-CAVP's slow streams; null without a reward",
            nullable=True,
        ),
        Column(
            name="temporal",
            type=_plain(pa.float32()),
            doc="does it keep its time: SF-CAVP's fast similarity against that of shifted sound; null without a reward",
            nullable=True,
        ),
        Column(name="reward", type=_plain(pa.float32()), doc="R of both parts; 0 is an average pair", nullable=True),
        Column(
            name="offset_s",
            type=_plain(pa.float32()),
            doc="shift at which sound and picture fit best, seconds; positive: the sound is late",
            nullable=True,
        ),
        Column(
            name="reward_invalid",
            type=_plain(pa.string()),
            doc="why there is no reward: silent, clipped, nonfinite, or what is wrong with the stored media",
            nullable=True,
        ),
    ),
)

CONTRACTS: dict[str, Contract] = {c.name: c for c in (FEATURES, REJECTS, PAIRS, DEGRADED, SCORES, SURVEY, MEASURES)}
