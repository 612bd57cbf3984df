"""SIGINT, SIGTERM and SIGHUP are one exception, raised once; what they did before is restored."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from rlhf_ray.errors import Interrupted
from rlhf_ray.processes.interrupts import SIGNALS, interruptible, kept_handlers


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_raised_once_and_the_handlers_are_restored(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    cleaned_up = []
    with pytest.raises(Interrupted) as caught, interruptible():
        try:
            signal.raise_signal(number)
        finally:
            for again in SIGNALS:
                signal.raise_signal(again)
            cleaned_up.append("whole")
    assert cleaned_up == ["whole"]
    assert (caught.value.exit_code, str(caught.value)) == (128 + number, f"stopped by {number.name}")
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_plain_interrupt_keeps_the_number_of_its_signal():
    """Ray makes one of whatever a handler raises while it waits."""
    with pytest.raises(Interrupted) as caught, interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise KeyboardInterrupt from None
    assert caught.value.number == signal.SIGTERM


def test_nohup_holds():
    with kept_handlers():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with interruptible():
                signal.raise_signal(signal.SIGHUP)
        except Interrupted as error:
            pytest.fail(repr(error))


def test_another_thread_leaves_the_signals_alone():
    before = [signal.getsignal(one) for one in SIGNALS]
    seen = []

    def work() -> None:
        with interruptible():
            seen.extend(signal.getsignal(one) for one in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


def test_a_signal_on_which_a_library_exits_meanwhile_is_handled_as_before():
    """As in ``ray.init``, which takes SIGTERM for itself."""
    with pytest.raises((Interrupted, SystemExit)) as caught, interruptible(), kept_handlers(exits_on=signal.SIGTERM):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)
    assert str(caught.value) == "stopped by SIGTERM"


@pytest.mark.parametrize("code", [2, 15, 75, None])
def test_an_exit_of_another_kind_stays_one(code):
    """Codes are numbers of signals too: 2 of a wrong request, 15 where nothing takes SIGTERM."""
    with pytest.raises(SystemExit) as caught, interruptible():
        sys.exit(code)
    assert caught.value.code == code
