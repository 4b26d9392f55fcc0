"""MMAudio's columns from files of embeddings and logits that were made outside.

A column, a Fréchet distance too, is over the clips that both files of its kind know, so that every number of a table is
about the same clips; clips that only one knows are counted and told. (av-benchmark takes all rows of either file for
distances and inception score: where the files hold the same clips, as they should, that is the same.) RPO may train on
VGG-SS, which lies inside VGGSound's test split: with its ids every column is given a second time without them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.errors import InputError
from pipelines.evaluation.embedding_metrics import COLUMNS, KINDS, EmbeddingColumn
from pipelines.evaluation.external import ExternalFiles, ExternalRows, is_among, one_line, read_external
from pipelines.evaluation.summary import FRECHET_CLIPS
from pipelines.evaluation.tables import ARROWS, align

ALL_CLIPS, WITHOUT_VGG_SS = "all_clips", "without_vgg_ss"


@dataclass(frozen=True, kw_only=True)
class ColumnValue:
    """One number of the table and the clips behind it."""

    value: float
    num_clips: int
    """Clips it is over: those of the generated file, and of the reference where there is one."""
    num_missing: int
    """Clips of the reference that the generated file lacks; 0 without a reference."""
    num_extra: int
    """Clips of the generated file that the reference lacks; 0 without a reference."""


@dataclass(frozen=True, kw_only=True)
class ExternalColumns:
    """MMAudio's columns, as many as there are files for."""

    values: dict[str, dict[str, ColumnValue]]
    """`all_clips`, and `without_vgg_ss` where ids were given -> column -> value; in the order of the table."""
    cautions: tuple[str, ...]
    """What a reader must know, in whole sentences."""

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries."""
        names = self.values[ALL_CLIPS]
        return {
            "columns": {c.name: {"better": c.better, "meaning": c.meaning} for c in COLUMNS if c.name in names},
            "values": {subset: {n: vars(v) for n, v in row.items()} for subset, row in self.values.items()},
            "cautions": list(self.cautions),
        }

    def to_text(self) -> str:
        """One line a column: each subset's value, clips, missing and extra ones; then the cautions."""
        header = ["column", *(t for s in self.values for t in (s.replace("_", " "), "clips", "missing", "extra"))]
        lines = [header]
        for column in COLUMNS:
            if column.name in self.values[ALL_CLIPS]:
                cells = [cell for row in self.values.values() for cell in _cells(row.get(column.name))]
                lines.append([f"{column.name} {ARROWS[column.better]}", *cells])
        return "\n".join([*align(lines), *(["", *self.cautions] if self.cautions else [])]) + "\n"


def mmaudio_columns(
    files: Mapping[str, ExternalFiles], *, vgg_ss_ids: Collection[str] | None = None
) -> ExternalColumns:
    """MMAudio's columns from files by kind (`KINDS`), over all clips and, with VGG-SS ids, again without those.

    A column is absent where its files are, and where too few clips are left to define it; a caution says which.

    Raises:
        InputError: an unknown kind, a file that cannot be used, two files of a pair with unequal widths or no clip in
            common, a width that the column does not know, or a value that is not finite.
    """
    unknown = sorted(set(files) - set(KINDS))
    if unknown:
        raise InputError(f"external files of kind {unknown[0]!r}: give one of {', '.join(KINDS)}")
    pairs = {kind: _read_pair(kind, files[kind]) for kind in files}
    cautions = [
        text for kind, (generated, reference) in pairs.items() for text in _unmatched(kind, generated, reference)
    ]
    values = {ALL_CLIPS: _row(pairs, ALL_CLIPS, cautions)}
    if vgg_ss_ids is not None:
        excluded = frozenset(vgg_ss_ids)
        if not any(is_among(clip_id, excluded) for generated, _ in pairs.values() for clip_id in generated.clip_ids):
            cautions.append(
                f"None of the {len(excluded)} VGG-SS ids is among the clips, so nothing was left out: compare how the "
                "ids are written."
            )
        rest = {
            kind: (generated.without(excluded), None if reference is None else reference.without(excluded))
            for kind, (generated, reference) in pairs.items()
        }
        values[WITHOUT_VGG_SS] = _row(rest, WITHOUT_VGG_SS, cautions)
    few = [c.name for c in COLUMNS if c.name.startswith("FD") and _least(values, c.name) < FRECHET_CLIPS]
    if few:
        cautions.append(
            f"{', '.join(few)}: over fewer than {FRECHET_CLIPS} clips a Fréchet distance's own bias is large; compare "
            "it over the same clips only, not with other tables."
        )
    return ExternalColumns(values=values, cautions=tuple(cautions))


_Pair = tuple[ExternalRows, ExternalRows | None]


def _read_pair(kind: str, files: ExternalFiles) -> _Pair:
    generated = read_external(files.generated)
    if files.reference is None:
        return generated, None
    reference = read_external(files.reference)
    if generated.values.shape[1] != reference.values.shape[1]:
        raise InputError(
            f"{kind}: rows of {generated.location} have {generated.values.shape[1]} values and those of "
            f"{reference.location} {reference.values.shape[1]}; make both with the same network"
        )
    if not set(generated.clip_ids) & set(reference.clip_ids):
        raise InputError(
            f"{kind}: {generated.location} (such as {generated.clip_ids[0]!r}) and {reference.location} (such as "
            f"{reference.clip_ids[0]!r}) have no clip in common; write ids of both the same way"
        )
    return generated, reference


def _unmatched(kind: str, generated: ExternalRows, reference: ExternalRows | None) -> list[str]:
    if reference is None:
        return []
    missing, extra = (
        sorted(set(reference.clip_ids) - set(generated.clip_ids)),
        sorted(set(generated.clip_ids) - set(reference.clip_ids)),
    )
    told = (
        (missing, f"clips of {reference.location} are missing from {generated.location}"),
        (extra, f"clips of {generated.location} are not in {reference.location}"),
    )
    return [f"{kind}: {len(ids)} {what}, such as {ids[0]!r}; they are left out." for ids, what in told if ids]


def _row(pairs: Mapping[str, _Pair], subset: str, cautions: list[str]) -> dict[str, ColumnValue]:
    """The columns of one subset; what is left out for want of clips or of a reference is added to the cautions."""
    row = {}
    for column in COLUMNS:
        if column.kind not in pairs:
            continue
        generated, reference = pairs[column.kind]
        if reference is None and column.of_pair is not None:
            if subset == ALL_CLIPS:
                cautions.append(f"{column.name} is left out: {column.kind} has no reference file.")
            continue
        mine, theirs = set(generated.clip_ids), set((reference or generated).clip_ids)
        shared = mine & theirs
        if len(shared) < column.min_clips:
            cautions.append(
                f"{column.name} of {subset.replace('_', ' ')} is left out: it needs {column.min_clips} clips or more "
                f"and there are {len(shared)}."
            )
            continue
        row[column.name] = ColumnValue(
            value=_value(column, generated, reference, shared),
            num_clips=len(shared),
            num_missing=len(theirs - mine),
            num_extra=len(mine - theirs),
        )
    return row


def _value(
    column: EmbeddingColumn, generated: ExternalRows, reference: ExternalRows | None, shared: Collection[str]
) -> float:
    value = np.nan
    try:
        # What overflows or underflows comes out as not finite, and is refused by name below.
        with np.errstate(all="ignore"):
            if column.of_pair is not None and reference is not None:
                value = column.of_pair(reference.only(shared), generated.only(shared))
            elif column.of_generated is not None:
                value = column.of_generated(generated.only(shared))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise InputError(f"{column.name} from {generated.location}: {one_line(error)}") from error
    if not np.isfinite(value):
        raise InputError(
            f"{column.name} from {generated.location} is not a finite number: its values lie too far apart; look at "
            f"what the network gave ({KINDS[column.kind]})"
        )
    return value


def _least(values: Mapping[str, Mapping[str, ColumnValue]], name: str) -> float:
    return min((row[name].num_clips for row in values.values() if name in row), default=np.inf)


def _cells(value: ColumnValue | None) -> list[str]:
    if value is None:
        return ["-"] * 4
    return [f"{value.value:z.3f}", str(value.num_clips), str(value.num_missing), str(value.num_extra)]
