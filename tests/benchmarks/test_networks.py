import json
from pathlib import Path

import pytest
import torch

from benchmarks import networks


@pytest.fixture(autouse=True)
def _a_small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "matrix_flops_per_s", lambda _: 1e9)


def _small() -> networks.Case:
    return networks.Case("vocoder", lambda: torch.ones(30, 50) @ torch.ones(50, 70), times=4)


def test_a_row_scales_time_and_arithmetic_by_how_often_a_case_is_run() -> None:
    row = networks.measure(_small(), repeats=3)
    assert row["GFLOP"] == pytest.approx(4 * 2 * 30 * 50 * 70 / 1e9)
    seconds = row["CPU s"]
    assert isinstance(seconds, float)
    assert row["share"] == pytest.approx(2 * 30 * 50 * 70 / (seconds / 4) / 1e9)
    assert row["original / ours"] == pytest.approx(14.4 / seconds)


def test_a_profile_names_operations_whose_shares_are_parts_of_one() -> None:
    profiled = networks.where_time_goes(_small().run)
    assert "aten::mm" in {name for name, _, _ in profiled}
    assert 0.5 < sum(share for _, share, _ in profiled) <= 1.0 + 1e-9


def test_the_table_becomes_json_with_its_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(networks.CASES, "frozen", lambda: iter([_small()]))
    path = tmp_path / "networks.json"
    networks.main(["--only", "frozen", "--repeats", "1", "--profile", "--json", str(path)])
    content = json.loads(path.read_text())
    assert [row["network, 8 s"] for row in content["rows"]] == ["vocoder"]
    assert content["share of time by operation"]["vocoder"]
    assert content["date"] >= "2026"
    assert "vocoder" in capsys.readouterr().out
