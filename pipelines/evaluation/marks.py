"""True events and heard ones side by side: what was found, missed, or heard without being there."""

from collections.abc import Callable, Sequence

from pipelines.data.demo_world import Event
from pipelines.evaluation.detector import TOLERANCE_S, Detection
from pipelines.evaluation.listening_page import Mark


def mark_events(events: Sequence[Event], detected: Sequence[Detection]) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
    """Marks of the true events and of the heard ones.

    Pairs with the right variant are made first, then pairs of the right kind alone; each event and each detection is
    in one pair at most.
    """
    event_verdicts = ["missed"] * len(events)
    heard_verdicts = ["false"] * len(detected)
    for verdict, same in (("hit", _same_class), ("right-time", _same_kind)):
        for i, j in _pairs(events, detected, event_verdicts, heard_verdicts, same):
            event_verdicts[i] = heard_verdicts[j] = verdict
    true_marks = tuple(
        Mark(time_s=e.time_s, duration_s=e.duration_s, kind=e.kind, variant=e.variant, verdict=v)
        for e, v in zip(events, event_verdicts, strict=True)
    )
    heard_marks = tuple(
        Mark(time_s=d.time_s, duration_s=0.0, kind=d.kind, variant=d.variant, verdict=v)
        for d, v in zip(detected, heard_verdicts, strict=True)
    )
    return true_marks, heard_marks


def _same_class(event: Event, heard: Detection) -> bool:
    return (event.kind, event.variant) == (heard.kind, heard.variant)


def _same_kind(event: Event, heard: Detection) -> bool:
    return event.kind == heard.kind


def _pairs(
    events: Sequence[Event],
    detected: Sequence[Detection],
    event_verdicts: Sequence[str],
    heard_verdicts: Sequence[str],
    same: Callable[[Event, Detection], bool],
) -> list[tuple[int, int]]:
    """(event, detection) of those still free, in order of time: each event takes the first that fits."""
    pairs, taken = [], set()
    for i in sorted(range(len(events)), key=lambda i: events[i].time_s):
        for j in sorted(range(len(detected)), key=lambda j: detected[j].time_s):
            free = event_verdicts[i] == "missed" and heard_verdicts[j] == "false" and j not in taken
            if free and same(events[i], detected[j]) and abs(events[i].time_s - detected[j].time_s) <= TOLERANCE_S:
                pairs.append((i, j))
                taken.add(j)
                break
    return pairs
