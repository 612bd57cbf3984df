"""Cases are chosen by words, and a word that no name holds is refused."""

from __future__ import annotations

import pytest

from tests.faults.named import chosen

CASES = {"driver hangs": 1, "policy hangs": 2, "policy is stopped": 3}


def test_words_choose_and_no_words_mean_all() -> None:
    assert chosen("tries", CASES, []) == CASES
    assert list(chosen("tries", CASES, ["policy"])) == ["policy hangs", "policy is stopped"]
    assert list(chosen("tries", CASES, ["driver", "stopped"])) == ["driver hangs", "policy is stopped"]


def test_a_word_that_no_name_holds_is_refused_beside_one_that_some_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chosen("tries", CASES, ["policy", "critic"])
    assert ended.value.code == 2
    assert (
        "no case has 'critic' in its name; cases: driver hangs, policy hangs, policy is stopped"
        in capsys.readouterr().err
    )
