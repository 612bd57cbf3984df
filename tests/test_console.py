"""What is said on standard error costs nothing where nobody can hear it."""

from __future__ import annotations

import io

import pytest

from rlhf_ray import console


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Gone(), closed()], ids=["gone", "closed"])
def test_a_table_for_a_terminal_that_is_gone_ends_nothing(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "stderr", console.LastingConsole(file=stream))
    console.say("a table")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3599.6, "1 h"),
        (3601, "1 h"),
        (7199, "1 h 59 min"),
        (86_460, "1 d"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_time_has_at_most_two_units_that_follow_one_another(seconds: float, words: str) -> None:
    assert console.duration(seconds) == words
