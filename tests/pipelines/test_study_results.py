"""A study's numbers: paired by clip and replicate, two uncertainties kept apart, tables of what is done alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.evaluation.scores import ClipScores
from pipelines.evaluation.study_page import values_table, write_results
from pipelines.evaluation.study_results import StudyNumbers, ranking_result
from pipelines.evaluation.summary import summarise
from tests.pipelines.score_factory import candidate, random_rows, score_row, score_table


def scores_of(rows: list[dict]) -> ClipScores:
    return ClipScores.from_table(score_table(rows))


def with_rewards(rewards: list[float | None]) -> ClipScores:
    return scores_of([score_row(f"clip_{i}", [candidate(r, 1, 1, 1)], num_events=1) for i, r in enumerate(rewards)])


def test_a_difference_is_the_mean_over_replicates_of_paired_differences() -> None:
    noise = np.random.default_rng(0).normal(size=40)
    cells = {
        "m0": {0: with_rewards(list(noise)), 1: with_rewards(list(noise + 10))},
        "arm": {0: with_rewards(list(noise + 0.5)), 1: with_rewards(list(noise + 10.1))},
    }
    found = StudyNumbers(cells).difference("arm", "m0", "reward")
    assert found is not None
    # Each replicate's difference is the same for all clips: no doubt over clips, all of it between replicates.
    assert found.by_seed == pytest.approx({0: 0.5, 1: 0.1}, abs=1e-6)
    assert (found.mean.value, found.mean.lo, found.mean.hi) == pytest.approx((0.3, 0.3, 0.3), abs=1e-6)
    assert found.spread == pytest.approx(math.sqrt(2) * 0.2, abs=1e-6)


def test_of_one_replicate_the_numbers_are_those_of_the_score_table() -> None:
    a, b = scores_of(random_rows(60, 2, 1, 0.5)), scores_of(random_rows(60, 2, 2, 0.7))
    numbers = StudyNumbers({"m0": {0: a}, "arm": {0: b}})
    table = summarise({"m0": a, "arm": b}, baseline="m0")
    for metric in ("class_f1", "frechet", "reward", "diversity"):
        assert numbers.value("arm", metric).mean == table.estimates["arm"][metric]
        difference = numbers.difference("arm", "m0", metric)
        assert difference is not None
        assert difference.mean == table.differences["arm"][metric]
        assert math.isnan(difference.spread)


def test_a_clip_that_the_reward_refuses_on_one_side_counts_for_neither() -> None:
    numbers = StudyNumbers({"m0": {0: with_rewards([0.0, 0.0])}, "arm": {0: with_rewards([1.0, None])}})
    found = numbers.difference("arm", "m0", "reward")
    assert found is not None
    assert found.mean.value == pytest.approx(1.0)


def test_arms_are_compared_on_the_replicates_that_both_have() -> None:
    cells = {"m0": {0: with_rewards([0.0, 1.0]), 1: with_rewards([5.0, 6.0])}, "arm": {1: with_rewards([7.0, 8.0])}}
    numbers = StudyNumbers(cells)
    found = numbers.difference("arm", "m0", "reward")
    assert found is not None
    assert found.by_seed == pytest.approx({1: 2.0})
    assert numbers.difference("arm", "nobody", "reward") is None


def test_what_no_replicate_has_is_no_number_and_no_column() -> None:
    codec = with_rewards([3.0, 4.0])
    beside, alone = with_rewards([0.0, 1.0]).beside_codec(codec), with_rewards([2.0, 3.0])
    numbers = StudyNumbers({"m0": {0: beside, 1: alone}, "arm": {0: alone, 1: alone}})
    found = numbers.value("m0", "frechet_codec")
    assert found is not None
    assert list(found.by_seed) == [0]
    assert numbers.value("arm", "frechet_codec") is None
    assert numbers.difference("arm", "m0", "frechet_codec") is None
    assert numbers.value("arm", "fm_loss") is None
    table = values_table(numbers).splitlines()
    assert "Fréchet to codec" in table[3]
    assert "FM error" not in table[3]
    assert table[6].count(" - |") == 1


def test_cells_of_other_clips_are_refused() -> None:
    with pytest.raises(InputError, match="differ in their clips"):
        StudyNumbers({"m0": {0: with_rewards([0.0, 1.0])}, "arm": {0: with_rewards([0.0, 1.0, 2.0])}})


def test_a_reward_that_is_the_score_gains_all_that_the_oracle_gains() -> None:
    rows = [
        score_row(f"clip_{i}", [candidate(float(k), 4, k, k) for k in ((i + j) % 5 for j in range(3))], num_events=4)
        for i in range(20)
    ]
    perfect = ranking_result(scores_of(rows))
    assert perfect.rho.value == pytest.approx(1.0)
    assert perfect.share == pytest.approx(1.0)
    assert perfect.picked == pytest.approx(perfect.oracle)
    assert perfect.picked[3] > perfect.picked[2] > perfect.picked[1]
    for row in rows:
        for one in row["candidates"]:
            one["total"] = -one["total"]
    assert ranking_result(scores_of(rows)).rho.value == pytest.approx(-1.0)
    assert ranking_result(scores_of(rows)).share < 0


def test_the_results_of_an_unfinished_study_are_written_from_what_is_done(tmp_path: Path) -> None:
    cells = {name: {0: scores_of(random_rows(30, 2, seed, 0.5))} for seed, name in enumerate(("m0", "arm"))}
    text = write_results(
        tmp_path,
        done="7 of 9 stages are done.",
        cells=cells,
        rankings={"plain": {0: ranking_result(cells["m0"][0])}},
        rounds=({"arm": [(0.0, 0.5), (0.2, 0.6)]}, {"arm": [(0.1, -0.1)]}),
        worker_seconds={"m0": 12.0},
        val_cells={"m0": cells["m0"]},
        compared_with=("m0", "control"),
        claims=(("arm", "m0"), ("arm", "control")),
    )
    assert text == (tmp_path / "tables.md").read_text()
    assert "7 of 9 stages" in text
    assert "Minus m0" in text
    assert "Minus control" not in text
    assert "arm minus m0" in text
    assert "arm minus control" not in text
    content = json.loads((tmp_path / "results.json").read_text())
    expected = StudyNumbers(cells).value("arm", "class_f1").mean.value
    assert content["values"]["arm"]["class_f1"]["mean"]["value"] == pytest.approx(expected)
    for name in ("frontier.svg", "diversity.svg", "best_of_n.svg", "reward_and_f1.svg", "displacement.svg"):
        assert (tmp_path / name).read_text().startswith("<svg")


def test_without_a_finished_cell_only_the_count_is_written(tmp_path: Path) -> None:
    text = write_results(
        tmp_path,
        done="0 of 9 stages are done.",
        cells={},
        rankings={},
        rounds=({}, {}),
        worker_seconds={},
        val_cells={},
        compared_with=("m0",),
        claims=(),
    )
    assert text == "0 of 9 stages are done.\n"
