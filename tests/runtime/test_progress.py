"""Progress on a terminal and elsewhere."""

import time

import pytest
from rich.console import Console

from redefense.runtime import progress
from redefense.runtime.progress import BAR_INTERVAL, PLAIN_INTERVAL, Bar, Counter, clock_time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `progress` sees, in seconds; tests set it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (130.0, "2:10"), (3725.0, "1:02:05")]
)
def test_times_read_as_clocks(seconds: float, words: str) -> None:
    assert clock_time(seconds) == words


def test_a_counter_logs_the_times_at_the_mean_speed_of_the_new_units(clock: list[float]) -> None:
    lines = list[str]()
    counter = Counter("train", 100, unit="steps", log=lines.append, done=40)
    counter.advance(10)
    assert lines == []  # the interval is not over
    clock[0] += 20.0
    counter.advance(10, "loss 0.500")  # 20 steps in 20 s, 40 to go
    assert lines == ["train: 60/100 steps, loss 0.500, 0:20 elapsed, 0:40 remaining"]
    clock[0] += PLAIN_INTERVAL / 2
    counter.advance(1)
    counter.close()
    assert len(lines) == 1


def test_a_bar_is_drawn_on_a_terminal_and_nothing_without_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "Console", lambda **_: Console(force_terminal=True, width=80))
    lines = list[str]()
    for log in (lines.append, None):
        bar = Bar(log)
        bar.show(
            "cell 3/7 meanprob APGD", 0.4, "119/300 images; in total 0:08 elapsed, 1:07 remaining"
        )
        bar.close()
        drawn = capsys.readouterr().out
        # whole on a terminal of 80 columns
        assert ("cell 3/7 meanprob APGD" in drawn and "1:07 remaining" in drawn) is (
            log is not None
        )
        assert bar.every == BAR_INTERVAL
    assert lines == []
