import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.preferences.gate import CRITERIA, GateLimits, judge

BEFORE = {
    "reward": 1.0,
    "fm_loss": 0.5,
    "diversity": 0.2,
    "f1": 0.7,
    "class_f1": 0.5,
    "log_mel_distance": 0.15,
    "frechet_codec": 0.3,
}
BETTER = {**BEFORE, "reward": 1.1}


def changed(**values: float) -> dict[str, float]:
    return {**BETTER, **values}


def test_a_round_that_raises_the_reward_and_harms_nothing_is_accepted():
    verdict = judge(BEFORE, BETTER, GateLimits())
    assert verdict.accepted
    assert verdict.reasons == []
    assert len(verdict.checks) == len(CRITERIA)


@pytest.mark.parametrize(
    ("after", "measure"),
    [
        (changed(reward=1.0), "reward"),
        (changed(reward=0.9), "reward"),
        (changed(fm_loss=0.516), "fm_loss"),
        (changed(diversity=0.17), "diversity"),
        (changed(f1=0.67), "f1"),
        (changed(class_f1=0.47), "class_f1"),
        (changed(log_mel_distance=0.17), "log_mel_distance"),
        (changed(frechet_codec=0.5), "frechet_codec"),
    ],
)
def test_reward_hacking_is_refused_with_the_measure_that_paid_for_it(after, measure):
    verdict = judge(BEFORE, after, GateLimits())
    assert not verdict.accepted
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith(f"{measure} ")


def test_changes_within_the_limits_pass():
    after = changed(fm_loss=0.514, diversity=0.185, f1=0.681, class_f1=0.481, log_mel_distance=0.16, frechet_codec=0.44)
    assert judge(BEFORE, after, GateLimits()).accepted


def test_limits_are_options():
    assert not judge(BEFORE, BETTER, GateLimits(min_reward_gain=0.2)).accepted
    assert judge(BEFORE, changed(fm_loss=0.6), GateLimits(max_fm_loss_rise=0.5)).accepted


@pytest.mark.parametrize("measure", ["reward", "fm_loss", "diversity"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_was_not_measured_is_not_accepted(measure, value):
    after = {**BETTER, measure: value}
    verdict = judge(BEFORE, after, GateLimits(max_fm_loss_rise=1e9, max_diversity_fall=1e9))
    assert any("was not measured" in reason for reason in verdict.reasons)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_a_corpus_without_events_is_judged_on_the_rest():
    known = {name: value for name, value in BEFORE.items() if name not in ("f1", "class_f1")}
    verdict = judge(known, {**known, "reward": 1.1}, GateLimits())
    assert verdict.accepted
    assert {check.measure for check in verdict.checks} == set(known)


def test_a_measure_that_disappears_refuses_the_round():
    after = {name: value for name, value in BETTER.items() if name != "f1"}
    assert not judge(BEFORE, after, GateLimits()).accepted


def test_a_loss_that_was_zero_may_not_rise_at_all():
    assert not judge({**BEFORE, "fm_loss": 0.0}, changed(fm_loss=0.001), GateLimits()).accepted
    assert judge({**BEFORE, "fm_loss": 0.0}, changed(fm_loss=0.0), GateLimits()).accepted


@given(st.dictionaries(st.sampled_from(list(BEFORE)), st.floats()))
def test_every_verdict_is_plain_json_and_gives_reasons_exactly_when_it_refuses(after):
    verdict = judge(BEFORE, after, GateLimits())
    content = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert (content["verdict"] == "refused") == bool(content["reasons"])


@pytest.mark.parametrize("limits", [{"max_fm_loss_rise": -0.1}, {"max_f1_fall": math.nan}])
def test_a_senseless_limit_is_an_input_error(limits):
    with pytest.raises(InputError, match="--max"):
        GateLimits(**limits)
