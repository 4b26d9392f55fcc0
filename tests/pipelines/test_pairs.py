import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import ContractError, InputError
from pipelines.preferences.pairs import (
    DROP_REASONS,
    GROUND_TRUTH,
    Contender,
    choose,
    count_outcomes,
    parse_mixture,
    pick_mode,
    stable_seed,
)

GT_MODES = ("gt_vs_worst", "gt_vs_random", "gt_vs_distorted")
MODES = (*GT_MODES, "best_vs_worst")


def contender(reward: float, origin: str = GROUND_TRUTH, valid: bool = True, content: str | None = None) -> Contender:
    return Contender(origin=origin, reward=reward, valid=valid, content=origin if content is None else content)


def candidates(*rewards: float) -> list[Contender]:
    return [contender(reward, f"candidate_{i}") for i, reward in enumerate(rewards)]


REWARDS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0]), st.floats(-5, 5).map(lambda x: round(x, 1))
)
CONTENDERS = st.lists(st.tuples(REWARDS, st.booleans(), st.sampled_from(["a", "b", "c", "gt"])), max_size=6).map(
    lambda rows: [
        contender(reward, f"candidate_{i}", valid, content) for i, (reward, valid, content) in enumerate(rows)
    ]
)
GROUND_TRUTHS = st.builds(lambda reward, valid: contender(reward, GROUND_TRUTH, valid, "gt"), REWARDS, st.booleans())


@given(st.sampled_from(GT_MODES), GROUND_TRUTHS, CONTENDERS, st.floats(0, 2), st.integers(0, 2**32))
def test_a_ground_truth_mode_never_lets_a_candidate_win(mode, truth, others, margin, seed):
    choice = choose(mode, truth, others, margin, random.Random(seed))
    assert choice.winner is None or choice.winner.origin == GROUND_TRUTH
    assert choice.loser is None or choice.loser.origin != GROUND_TRUTH


@given(st.sampled_from(MODES), GROUND_TRUTHS, CONTENDERS, st.floats(0, 2), st.integers(0, 2**32))
def test_a_kept_pair_has_two_usable_different_sounds_a_margin_apart(mode, truth, others, margin, seed):
    choice = choose(mode, truth, others, margin, random.Random(seed))
    if not choice.kept:
        assert choice.drop_reason in DROP_REASONS
        return
    assert choice.winner is not None
    assert choice.loser is not None
    assert choice.winner.usable
    assert choice.loser.usable
    assert choice.winner.origin != choice.loser.origin
    assert choice.winner.content != choice.loser.content
    assert choice.winner.reward > choice.loser.reward
    assert choice.margin is not None
    assert choice.margin >= margin


@given(st.sampled_from(MODES), GROUND_TRUTHS, CONTENDERS, st.floats(0, 2), st.integers(0, 2**32))
def test_the_same_arguments_give_the_same_choice(mode, truth, others, margin, seed):
    first = choose(mode, truth, others, margin, random.Random(seed))
    again = choose(mode, truth, others, margin, random.Random(seed))
    assert (first.drop_reason, first.winner, first.loser) == (again.drop_reason, again.winner, again.loser)


@given(GROUND_TRUTHS, CONTENDERS)
def test_best_against_worst_does_not_look_at_the_ground_truth(truth, others):
    choice = choose("best_vs_worst", truth, others, 0.0, random.Random(0))
    other = choose("best_vs_worst", contender(math.nan, valid=False), others, 0.0, random.Random(0))
    assert choice == other
    assert choice.winner is None or choice.winner.origin != GROUND_TRUTH


def test_the_papers_mode_takes_the_lowest_valid_candidate():
    others = [*candidates(0.5, -1.0, 0.2), contender(-9.0, "candidate_3", valid=False)]
    choice = choose("gt_vs_worst", contender(1.0), others, 0.5, random.Random(0))
    assert choice.kept
    assert choice.loser == others[1]
    assert choice.margin == 2.0


def test_best_against_worst_takes_both_ends():
    others = candidates(0.5, -1.0, 0.7, math.nan)
    choice = choose("best_vs_worst", contender(0.0), others, 0.5, random.Random(0))
    assert (choice.winner, choice.loser) == (others[2], others[1])


def test_the_random_mode_reaches_every_valid_candidate_and_no_other():
    others = [*candidates(0.5, -1.0, 0.2), contender(-9.0, "candidate_3", valid=False)]
    losers = {choose("gt_vs_random", contender(5.0), others, 0.0, random.Random(seed)).loser for seed in range(50)}
    assert losers == set(others[:3])


def test_two_random_candidates_are_paired_whatever_their_rewards_and_never_with_themselves():
    others = [*candidates(0.5, -1.0, 0.5), contender(-9.0, "candidate_3", valid=False)]
    truth = contender(math.nan, valid=False)
    choices = [choose("random_vs_random", truth, others, 9.0, random.Random(seed)) for seed in range(50)]
    assert all(choice.kept for choice in choices)
    assert {(choice.winner, choice.loser) for choice in choices} == set(itertools.permutations(others[:3], 2))


@pytest.mark.parametrize(
    ("mode", "truth", "others", "reason"),
    [
        ("gt_vs_worst", contender(1.0), [], "invalid_candidate"),
        ("gt_vs_worst", contender(1.0), candidates(math.nan, math.inf), "invalid_candidate"),
        ("gt_vs_worst", contender(math.nan), candidates(0.0), "invalid_ground_truth"),
        ("gt_vs_random", contender(1.0, valid=False), candidates(0.0), "invalid_ground_truth"),
        ("gt_vs_worst", contender(0.2), candidates(0.3, 0.4), "gt_below_loser"),
        ("gt_vs_worst", contender(0.7), candidates(0.3, 0.4), "margin"),
        ("gt_vs_worst", contender(0.3), candidates(0.3, 0.4), "tie"),
        ("gt_vs_distorted", contender(0.3), [contender(0.1, "distorted_roll", content=GROUND_TRUTH)], "identical"),
        ("best_vs_worst", contender(1.0), candidates(0.3), "invalid_candidate"),
        ("best_vs_worst", contender(1.0), candidates(0.3, math.nan), "invalid_candidate"),
        ("best_vs_worst", contender(1.0), candidates(0.3, 0.3, 0.3), "tie"),
        ("best_vs_worst", contender(1.0), candidates(0.3, 0.6), "margin"),
        ("random_vs_random", contender(1.0), candidates(0.3, math.nan), "invalid_candidate"),
        ("random_vs_random", contender(1.0), [contender(0.1, "candidate_0", content="x")] * 2, "identical"),
    ],
)
def test_every_dropped_pair_says_why(mode, truth, others, reason):
    assert choose(mode, truth, others, 0.5, random.Random(0)).drop_reason == reason


def test_a_constant_reward_keeps_nothing_even_without_a_margin():
    for mode in MODES:
        choice = choose(mode, contender(0.4), candidates(0.4, 0.4, 0.4), 0.0, random.Random(0))
        assert choice.drop_reason == "tie"


def test_mixed_must_be_resolved_first():
    with pytest.raises(ValueError, match="pick_mode"):
        choose("mixed", contender(1.0), candidates(0.0), 0.0, random.Random(0))


def test_a_mixture_is_drawn_in_its_proportions():
    mixture = parse_mixture(["gt_vs_worst=0.5", "best_vs_worst=0.3", "gt_vs_distorted=0.2"])
    drawn = [pick_mode(mixture, random.Random(stable_seed(0, f"clip_{i}"))) for i in range(4000)]
    for mode, probability in mixture.items():
        assert abs(drawn.count(mode) / 4000 - probability) < 0.03


@pytest.mark.parametrize(
    "entries",
    [
        ["gt_vs_worst"],
        ["gt_vs_worst=half", "best_vs_worst=0.5"],
        ["gt_vs_worst=nan"],
        ["gt_vs_worst=0.5"],
        ["gt_vs_worst=1.5", "best_vs_worst=-0.5"],
        ["gt_vs_worst=0.5", "gt_vs_worst=0.5"],
        ["mixed=1"],
        [],
    ],
)
def test_a_wrong_mixture_is_an_input_error(entries):
    with pytest.raises(InputError, match="--mixture"):
        parse_mixture(entries)


def test_seeds_are_stable_63_bit_and_do_not_run_into_each_other():
    assert stable_seed(0, "clip", 0, 1) == 2_734_298_091_983_840_437
    seeds = {stable_seed(s, f"c{i}", k, n) for s in range(2) for i in range(20) for k in range(3) for n in range(5)}
    assert len(seeds) == 2 * 20 * 3 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stable_seed("a", "b") != stable_seed("ab", "")
    assert stable_seed("a", 1) != stable_seed("a", "1")


def test_counts_add_up_or_raise():
    counts = count_outcomes(5, [None, None, "margin", "tie"], 1)
    assert counts == {"clips": 5, "kept": 2, "dropped_tie": 1, "dropped_margin": 1, "rejects": 1}
    with pytest.raises(ContractError, match="6 clips went in"):
        count_outcomes(6, [None, None, "margin", "tie"], 1)
    with pytest.raises(ContractError):
        count_outcomes(1, ["whim"], 0)
