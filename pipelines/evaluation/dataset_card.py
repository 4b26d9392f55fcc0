"""A dataset on one page of text: rows, bytes, splits, captions, rejects, versions, and what it was made from."""

from collections import Counter
from typing import Any

from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset, contract_of, read_manifest

MOST_COMMON = 5
CAPTION_LENGTH = 60


def dataset_card(location: str) -> str:
    """The card of a finished dataset of any contract.

    Raises:
        InputError: nothing is there, it is not finished, or it is no dataset.
    """
    dataset = Dataset.open(location, contract_of(read_manifest(location, kind="dataset")))
    manifest = dataset.manifest
    entries = [*manifest["parts"], *manifest["rejects"]]
    lines: list[tuple[str, str]] = [
        ("dataset", dataset.folder.uri),
        ("contract", f"{manifest['contract']}/{manifest['version']}, made by {manifest['stage']}"),
        ("clips", f"spec {dataset.spec.name}, {dataset.spec.duration_s:g} s"),
        ("counts", ", ".join(f"{value} {name}" for name, value in manifest["counts"].items())),
        ("splits", ", ".join(f"{rows} {split}" for split, rows in sorted(dataset.splits.items())) or "none"),
        ("files", f"{len(entries)}, {_human(sum(e['bytes'] for e in entries))}, {_per_row(dataset)} a row"),
        ("rejects", _rejects(dataset)),
    ]
    if dataset.contract.name == FEATURES.name:
        lines += [("without video", f"{dataset.num_without_video()} rows"), *_captions(dataset)]
    lines += [
        ("digest", dataset.digest),
        ("fingerprint", dataset.fingerprint),
        *((f"made from {role}", value) for role, value in sorted(manifest["inputs"].items())),
        *((f"network {role}", value) for role, value in sorted(manifest.get("frozen", {}).items())),
        ("options", ", ".join(f"{name}={value}" for name, value in sorted(manifest["config"].items()))),
        ("code", ", ".join(f"{name} {value}" for name, value in sorted(manifest["code"].items()))),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines) + "\n"


def _captions(dataset: Dataset) -> list[tuple[str, str]]:
    captions: Counter[str] = Counter()
    for group in dataset.iter_row_groups(["caption"]):
        captions.update(group["caption"].to_pylist())
    empty = captions.pop("", 0)
    common = "; ".join(f"{count} x {_short(caption)}" for caption, count in captions.most_common(MOST_COMMON))
    return [("captions", f"{len(captions)} different, {empty} rows without"), ("most common", common or "none")]


def _rejects(dataset: Dataset) -> str:
    reasons = Counter(dataset.read_rejects()["reason"].to_pylist())
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"


def _per_row(dataset: Dataset) -> str:
    rows = dataset.num_rows()
    return _human(sum(part.bytes for part in dataset.parts) / rows) if rows else "0 B"


def _short(caption: str) -> str:
    text: Any = " ".join(caption.split())
    return text if len(text) <= CAPTION_LENGTH else text[: CAPTION_LENGTH - 3] + "..."


def _human(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} TB"
