"""Which events count as found on the listening page."""

from pipelines.data.demo_world import Event
from pipelines.evaluation.detector import Detection, match
from pipelines.evaluation.marks import mark_events


def event(time_s: float, kind: str = "ball", variant: str = "red") -> Event:
    return Event(time_s=time_s, duration_s=0.15, kind=kind, variant=variant)


def heard(time_s: float, kind: str = "ball", variant: str = "red") -> Detection:
    return Detection(time_s=time_s, kind=kind, variant=variant)


def verdicts(events: list[Event], detections: list[Detection]) -> tuple[list[str], list[str]]:
    true_marks, heard_marks = mark_events(events, detections)
    return [m.verdict for m in true_marks], [m.verdict for m in heard_marks]


def test_the_right_sound_at_the_right_time_is_a_hit() -> None:
    assert verdicts([event(0.5)], [heard(0.56)]) == (["hit"], ["hit"])


def test_the_wrong_pitch_at_the_right_time_is_only_the_right_time() -> None:
    assert verdicts([event(0.5)], [heard(0.5, variant="blue")]) == (["right-time"], ["right-time"])


def test_another_kind_or_a_late_sound_is_a_miss_and_a_false_alarm() -> None:
    assert verdicts([event(0.5)], [heard(0.5, kind="lamp", variant="cyan")]) == (["missed"], ["false"])
    assert verdicts([event(0.5)], [heard(0.62)]) == (["missed"], ["false"])


def test_one_detection_serves_one_event_and_the_right_variant_goes_first() -> None:
    events = [event(0.50), event(0.58, variant="blue")]
    assert verdicts(events, [heard(0.55, variant="blue")]) == (["missed", "hit"], ["hit"])
    assert verdicts([event(0.5), event(0.55)], [heard(0.52)]) == (["hit", "missed"], ["hit"])


def test_the_marks_agree_with_the_counts_of_the_score() -> None:
    events = [event(0.2), event(0.8, "lamp", "cyan"), event(1.4, "bar", "left"), event(2.0)]
    detections = [heard(0.25), heard(0.8, "lamp", "white"), heard(1.42, "bar", "left"), heard(1.0)]
    counts = match(detections, events)
    true_verdicts, heard_verdicts = verdicts(events, detections)
    assert true_verdicts.count("hit") == counts.num_class_matched == 2
    assert true_verdicts.count("hit") + true_verdicts.count("right-time") == counts.num_matched == 3
    assert heard_verdicts.count("false") == counts.num_detected - counts.num_matched == 1
