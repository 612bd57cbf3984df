"""Each turn of the assistant has a result, of all that was said before it and nothing after."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.turns import score_turns, turn_requests


class Lengths:
    """A model whose score is how many characters it read; it counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        self.calls += 1
        return [
            ScoreResult.of(float(sum(len(turn["content"]) for turn in request.messages or ()))) for request in requests
        ]


TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text("ab", max_size=4)}
)
CONVERSATION = st.lists(TURN, min_size=1, max_size=6).map(
    lambda turns: [*turns, {"role": "assistant", "content": "end"}]
)


def test_turns_are_found_under_any_names_of_theirs() -> None:
    requests = turn_requests([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
    assert requests == [
        ScoreRequest(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    ]


@given(st.lists(CONVERSATION, max_size=4))
def test_every_turn_is_scored_with_what_came_before_it(conversations: list[list[dict[str, str]]]) -> None:
    scorer = Lengths()
    rewards = [[result.reward for result in turns] for turns in score_turns(scorer.score, conversations)]
    expected = [
        [
            float(sum(len(turn["content"]) for turn in conversation[: end + 1]))
            for end, turn in enumerate(conversation)
            if turn["role"] == "assistant"
        ]
        for conversation in conversations
    ]
    assert rewards == expected and scorer.calls == 1


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(RequestError, match="without a turn of the assistant"):
        turn_requests([{"role": "user", "content": "why?"}])
