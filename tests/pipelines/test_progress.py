"""What was there before does not make the pace."""

import pytest

from pipelines import progress


def test_rows_of_an_earlier_attempt_do_not_count_into_the_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    with progress.Progress(label="steps", total=1000) as bar:
        now_s[0] = 100.0
        bar.start_at(900)
        now_s[0] = 120.0
        bar.advance(10)
    assert "steps: 910/1000 (0.5/s, 180 s left)" in capsys.readouterr().err
