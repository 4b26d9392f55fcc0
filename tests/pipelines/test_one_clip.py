"""docs/one-clip.md: it shows what is in the rows, and the committed page has every column of today's contracts."""

import re
from pathlib import Path

import numpy as np

from pipelines.data.contracts import DEGRADED, FEATURES, PAIRS, SCORES
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy
from pipelines.evaluation.one_clip import read_row, row_table
from tests.demo_factory import write_demo_features

PAGE = Path(__file__).resolve().parents[2] / "docs" / "one-clip.md"


def test_a_row_is_shown_column_by_column_with_its_own_values(tmp_path: Path) -> None:
    dataset = Dataset.open(str(write_demo_features(tmp_path / "features", {"train": 3})), FEATURES)
    clip_id = dataset.read(["clip_id"])["clip_id"].to_pylist()[1]
    row = read_row(dataset, FEATURES, clip_id)
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", row_table(FEATURES, row), re.MULTILINE))
    assert list(shown) == [column.name for column in FEATURES.columns]
    assert shown["clip_id"] == f"`{clip_id}`"
    latent = np.asarray(column_to_numpy(row["latent_mean"]), np.float64)
    assert shown["latent_mean"].startswith("float32 40 x 160, ")
    assert f"mean {latent.mean():.3g}" in shown["latent_mean"]
    assert shown["audio"].endswith("beginning `66 4c 61 43`"), "FLAC begins with fLaC"
    assert shown["events"].count("kind") == len(row["events"][0].as_py())


def test_the_committed_page_has_every_column_of_the_contracts_in_order() -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    for section, contract in zip(sections, (FEATURES, DEGRADED, PAIRS, SCORES), strict=True):
        columns = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        assert columns == [column.name for column in contract.columns], contract.name
