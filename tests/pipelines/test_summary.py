"""The score table: known answers for every metric, honest intervals, and no join by position."""

import itertools
import json

import numpy as np
import pytest

from pipelines.errors import ContractError, InputError
from pipelines.evaluation.ranking_quality import best_of_n, within_clip_correlation
from pipelines.evaluation.scores import ClipScores
from pipelines.evaluation.summary import summarise
from pipelines.evaluation.tables import best_of_n_text, plain_text
from tests.pipelines.score_factory import candidate, random_rows, score_row, score_table


def scores_of(rows: list[dict]) -> ClipScores:
    return ClipScores.from_table(score_table(rows))


def test_f1_is_micro_averaged_over_clips() -> None:
    # 1 of 2 found with 2 detections, 6 of 6 found with 8: F1 = 2 * 7 / (10 + 8), not the mean of 0.5 and 0.857.
    scores = scores_of(
        [
            score_row("a", [candidate(0.0, 2, 1, 0)], num_events=2),
            score_row("b", [candidate(0.0, 8, 6, 3)], num_events=6),
        ]
    )
    estimates = summarise({"M_0": scores}).estimates["M_0"]
    assert estimates["f1"].value == pytest.approx(14 / 18)
    assert estimates["class_f1"].value == pytest.approx(6 / 18)


def test_reward_and_its_parts_are_means_over_the_clips_that_the_reward_accepts() -> None:
    scores = scores_of(
        [
            score_row("a", [candidate(1.0)]),
            score_row("b", [candidate(None)]),
            score_row("c", [candidate(2.0)]),
        ]
    )
    summary = summarise({"M_0": scores})
    assert summary.estimates["M_0"]["reward"].value == pytest.approx(1.5)
    assert summary.estimates["M_0"]["reward_semantic"].value == pytest.approx(0.75)
    assert summary.estimates["M_0"]["reward_temporal"].value == pytest.approx(0.375)
    assert summary.num_invalid == {"M_0": 1}


def test_a_difference_uses_only_clips_that_both_subjects_have() -> None:
    base = scores_of([score_row("a", [candidate(1.0)]), score_row("b", [candidate(-9.0)])])
    other = scores_of([score_row("a", [candidate(1.5)]), score_row("b", [candidate(None)])])
    difference = summarise({"M_0": base, "M_1": other}).differences["M_1"]["reward"]
    assert difference.value == pytest.approx(0.5)


def test_without_known_events_there_is_no_f1_anywhere() -> None:
    summary = summarise({"M_0": scores_of([score_row("a", [candidate(1.0)]), score_row("b", [candidate(2.0)])])})
    assert {"f1", "class_f1", "diversity"}.isdisjoint(summary.estimates["M_0"])
    assert all(metric.name != "f1" for metric in summary.metrics)
    assert "onset F1" not in plain_text(summary)


def test_frechet_distance_of_the_real_sounds_to_themselves_is_zero_and_grows_with_a_shift() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 2))

    def shifted(by: float) -> ClipScores:
        return scores_of(
            [
                score_row(f"{i:02d}", [candidate(0.0)], statistics=truth[i] + by, truth_statistics=truth[i])
                for i in range(40)
            ]
        )

    summary = summarise({"same": shifted(0.0), "near": shifted(0.5), "far": shifted(2.0)}, num_resamples=20)
    values = [summary.estimates[label]["frechet"].value for label in ("same", "near", "far")]
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    # In units of the real sounds' spread, of 1 dB at least, a shift by s is a squared distance of sum (s / spread)^2.
    assert values[2] == pytest.approx(float(((2.0 / np.maximum(truth.std(axis=0), 1.0)) ** 2).sum()), rel=1e-3)
    assert values[0] < values[1] < values[2]


def test_beside_the_codec_a_policy_is_measured_by_what_it_can_reach() -> None:
    rng = np.random.default_rng(0)
    recorded = 3 * rng.normal(size=(40, 2))
    decoded = recorded + 2.0

    def with_statistics(statistics: np.ndarray) -> ClipScores:
        places = rng.permutation(40)
        return scores_of(
            [
                score_row(f"{i:02d}", [candidate(0.0)], statistics=statistics[i], truth_statistics=recorded[i])
                for i in places
            ]
        )

    codec = with_statistics(decoded)
    subjects = {"codec": codec, "near": with_statistics(recorded + 1.5), "far": with_statistics(recorded + 0.5)}
    assert "frechet_codec" not in summarise(subjects, num_resamples=2).estimates["near"]
    found = summarise({label: s.beside_codec(codec) for label, s in subjects.items()}, num_resamples=2).estimates
    to_codec, to_recorded = ({n: found[n][m].value for n in found} for m in ("frechet_codec", "frechet"))
    units = float((1 / recorded.std(axis=0) ** 2).sum())
    # Of two policies the one nearer to what the codec can give is the further one from the recordings.
    assert to_codec == pytest.approx({"codec": 0.0, "near": 0.25 * units, "far": 2.25 * units}, abs=1e-5)
    assert to_recorded == pytest.approx({"codec": 4 * units, "near": 2.25 * units, "far": 0.25 * units}, abs=1e-5)


def test_scores_of_other_clips_than_the_codecs_are_refused() -> None:
    with pytest.raises(InputError, match="differ in their clips"):
        scores_of([score_row("a", [candidate()])]).beside_codec(scores_of([score_row("b", [candidate()])]))


def test_the_scores_of_some_clips_are_those_of_an_evaluation_of_them_alone() -> None:
    rows = [
        score_row(name, [candidate(i), candidate(-i)], statistics=[i, i * i], truth_statistics=[-i, 1.0])
        for i, name in enumerate("dbac")
    ]
    codec = scores_of([score_row(name, [candidate()], statistics=[10.0 + i, 0.0]) for i, name in enumerate("dbac")])
    some = scores_of(rows).beside_codec(codec).of_clips(["c", "d"])
    alone = scores_of([rows[0], rows[3]]).beside_codec(codec.of_clips(("d", "c")))
    assert some.clip_ids == alone.clip_ids == ("c", "d")
    np.testing.assert_equal(vars(some), vars(alone))
    assert some.values["reward"].tolist() == [3.0, 0.0]
    assert some.codec_statistics is not None
    assert some.codec_statistics[:, 0].tolist() == [13.0, 10.0]
    with pytest.raises(InputError, match="not scored: 1 of the clips, such as 'x'"):
        codec.of_clips(["a", "x"])


def test_every_value_lies_in_its_interval_and_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = [score_row(f"{i:02d}", [candidate(float(rng.normal(3.0, 1.0)))]) for i in range(40)]
        estimate = summarise({"M": scores_of(rows)}, num_resamples=300).estimates["M"]["reward"]
        assert estimate.lo <= estimate.value <= estimate.hi
        covered += estimate.lo <= 3.0 <= estimate.hi
    # 60 draws at 95 %: fewer than 51 has a probability of about 0.003.
    assert covered >= 51


def test_the_frechet_interval_holds_its_value_although_resamples_are_biased_upward() -> None:
    estimate = summarise({"M": scores_of(random_rows(40, 1, seed=1, skill=0.5))}).estimates["M"]["frechet"]
    assert estimate.lo < estimate.value < estimate.hi


def test_a_paired_difference_is_sharper_than_the_intervals_of_its_two_sides() -> None:
    rng = np.random.default_rng(0)
    clip_level = rng.normal(0, 2, 60)
    rows = {
        label: [score_row(f"{i:02d}", [candidate(float(clip_level[i] + gain + rng.normal(0, 0.1)))]) for i in range(60)]
        for label, gain in (("M_0", 0.0), ("M_1", 0.2))
    }
    summary = summarise({label: scores_of(r) for label, r in rows.items()})
    own, difference = summary.estimates["M_1"]["reward"], summary.differences["M_1"]["reward"]
    assert difference.lo > 0
    assert difference.hi - difference.lo < 0.1 * (own.hi - own.lo)


def test_rows_are_joined_by_clip_id_whatever_their_order() -> None:
    rows = random_rows(20, 1, seed=0, skill=0.5)
    better = [score_row(r["clip_id"], [candidate(r["reward"]["total"] + 1.0)], num_events=None) for r in rows]
    summary = summarise({"M_0": scores_of(rows), "M_1": scores_of(better[::-1])})
    difference = summary.differences["M_1"]["reward"]
    assert difference.value == pytest.approx(1.0, abs=1e-6)
    assert difference.hi - difference.lo == pytest.approx(0.0, abs=1e-6)


def test_subjects_of_different_clips_are_refused_with_an_example() -> None:
    one, other = scores_of([score_row("a", [candidate()])]), scores_of([score_row("b", [candidate()])])
    with pytest.raises(InputError, match="1 lacking, 1 more, such as 'a'"):
        summarise({"M_0": one, "M_1": other})


def test_clips_with_unequal_numbers_of_candidates_are_refused() -> None:
    rows = [score_row("a", [candidate()]), score_row("b", [candidate(), candidate()])]
    with pytest.raises(ContractError, match=r"\[1, 2\] candidates"):
        scores_of(rows)


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(InputError, match="M_9"):
        summarise({"M_0": scores_of([score_row("a", [candidate()])])}, baseline="M_9")


def ranked(clip_id: str, rewards: list[float | None], class_matched: list[int]) -> dict:
    return score_row(
        clip_id, [candidate(r, 4, k, k) for r, k in zip(rewards, class_matched, strict=True)], num_events=4
    )


def test_rank_correlation_is_taken_inside_each_clip() -> None:
    scores = scores_of(
        [
            ranked("agrees", [0.1, 0.2, 0.3], [1, 2, 3]),
            ranked("disagrees", [10.3, 10.2, 10.1], [1, 2, 3]),
            ranked("tied", [1.0, 2.0, 3.0], [2, 2, 2]),
            ranked("refused", [None, 2.0, None], [1, 2, 3]),
        ]
    )
    found = dict(zip(scores.clip_ids, within_clip_correlation(scores), strict=True))
    assert found["agrees"] == pytest.approx(1.0)
    assert found["disagrees"] == pytest.approx(-1.0)
    assert np.isnan(found["tied"])
    assert np.isnan(found["refused"])
    assert summarise({"M": scores}).estimates["M"]["within_clip_rho"].value == pytest.approx(0.0)


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(3)
    rewards, found = rng.normal(size=5), rng.integers(0, 5, 5)
    curve = best_of_n(scores_of([ranked("a", rewards.tolist(), found.tolist())]))
    for n in range(1, 6):
        subsets = [list(s) for s in itertools.combinations(range(5), n)]
        picked = np.mean([found[max(s, key=lambda i: rewards[i])] for s in subsets])
        best = np.mean([max(found[s]) for s in subsets])
        # 4 detections and 4 events: F1 = 2 k / 8.
        assert curve.picked[n].value == pytest.approx(picked / 4)
        assert curve.oracle[n].value == pytest.approx(best / 4)


def test_a_refused_candidate_is_picked_only_when_all_are_refused() -> None:
    scores = scores_of([ranked("a", [None, 0.1], [4, 1]), ranked("b", [None, -5.0], [4, 1])])
    assert best_of_n(scores).picked[2].value == pytest.approx(2 * 1 / 8)


def test_best_of_n_falls_back_on_the_mel_distance_where_no_events_are_known() -> None:
    rows = [score_row("a", [candidate(0.0, mel_distance=0.4), candidate(1.0, mel_distance=0.2)])]
    curve = best_of_n(scores_of(rows))
    assert curve.score == "mel_distance"
    assert curve.picked[1].value == pytest.approx(0.3)
    assert curve.picked[2].value == pytest.approx(0.2)
    assert curve.oracle[2].value == pytest.approx(0.2)


def test_a_reward_that_sees_the_score_gains_more_than_one_that_guesses() -> None:
    seeing = best_of_n(scores_of(random_rows(80, 5, seed=0, skill=0.5)))
    rows = random_rows(80, 5, seed=0, skill=0.5)
    rng = np.random.default_rng(1)
    for row in rows:
        for entry in row["candidates"]:
            entry["total"] = float(rng.normal())
    guessing = best_of_n(scores_of(rows))
    assert seeing.picked[5].value > seeing.picked[1].value + 0.1
    assert abs(guessing.picked[5].value - guessing.picked[1].value) < 0.06
    assert seeing.oracle[5].value >= seeing.picked[5].value


def test_the_summary_is_the_same_every_time_and_is_plain_json() -> None:
    def make() -> str:
        scores = {"M_0": scores_of(random_rows(30, 3, 0, 0.4)), "M_1": scores_of(random_rows(30, 3, 1, 0.6))}
        return json.dumps(summarise(scores, num_resamples=100).to_json(), allow_nan=False)

    first = make()
    assert first == make()
    values = json.loads(first)["subjects"]["M_1"]
    assert values["values"]["f1"]["lo"] < values["values"]["f1"]["value"] < values["values"]["f1"]["hi"]
    assert values["difference_from_baseline"]["f1"]["value"] > 0


def test_the_plain_table_names_every_subject_and_marks_clear_differences() -> None:
    scores = {"M_0": scores_of(random_rows(60, 2, 0, 0.3)), "M_1": scores_of(random_rows(60, 2, 1, 0.9))}
    text = plain_text(summarise(scores, num_resamples=100))
    rows = [line for line in text.splitlines() if line.startswith("M_1")]
    assert len(rows) == 2
    assert "*" in rows[1]
    assert "60 clips only" in text
    assert "Best of n candidates of M_1" in best_of_n_text("M_1", best_of_n(scores["M_1"]))
