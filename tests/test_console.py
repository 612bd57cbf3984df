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
