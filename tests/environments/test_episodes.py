"""The prompt of a turn is all ids before it, byte for byte; only what was sampled is an action; rewards stand at the ends of
turns; an episode that failed has none.
"""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.data.tokenizers import make_byte_pair_tokenizer
from rlhf_ray.environments.bridge import Bridge
from rlhf_ray.environments.episodes import EpisodePlayer, Limits
from rlhf_ray.environments.protocol import EpisodeFailure, Failed, Turn
from rlhf_ray.rollout.requests import Generation, gather, make_requests, request_seed
from rlhf_ray.trajectories.batch import FinishReason
from rlhf_ray.trajectories.kept_sets import KeptSets

TOKENIZER = make_byte_pair_tokenizer(iter(["abc"]), 259)
EOS = TOKENIZER.eos_token_id


def encode(text):
    return TOKENIZER(text)["input_ids"]


class Engine:
    """Samples texts from a script by turn; log-probs and versions say at which position a token was sampled."""

    def __init__(self, *script, cut=()):
        self.script, self.cut, self.calls = script, cut, []

    def __call__(self, requests):
        turn = len(self.calls)
        self.calls.append(list(requests))
        generations = []
        for request in requests:
            cut = (turn, request.prompt_id) in self.cut
            ids = [*encode(self.script[min(turn, len(self.script) - 1)]), *([] if cut else [EOS])]
            places = range(len(request.token_ids), len(request.token_ids) + len(ids))
            reason = FinishReason.LENGTH if cut else FinishReason.STOP
            logs = tuple(-float(place) for place in places)
            generations.append(
                Generation(request.prompt_id, request.sample_index, tuple(ids), logs, tuple(places), reason)
            )
        return gather(requests, generations)


class Environments:
    """Outcomes by prompt and turn; remembers what it was asked."""

    def __init__(self, outcomes):
        self.outcomes, self.asked = outcomes, []

    def ask(self, questions):
        self.asked.append(list(questions))
        return [(*self.outcomes[question.episode[0]], *[END] * 9)[len(question.turns)] for question in questions]


def play(engine, outcomes, *, turns=4, tokens=100, seed=None, samples=1):
    prompts = {number: TokenizedPrompt(number, f"q{number}", tuple(encode(f"q{number}"))) for number in outcomes}
    environments = Environments(outcomes)
    player = EpisodePlayer(environments, Bridge(ChatFormat(TOKENIZER)), Limits(turns, tokens), [EOS], "mine")
    requests = make_requests(
        [(number, prompt.token_ids) for number, prompt in prompts.items()],
        samples_per_prompt=samples, max_new_tokens=8, run_seed=seed, step=3,
    )  # fmt: skip
    return player.play(requests, prompts, engine, run_seed=7, step=3), environments


def rows(batch, column):
    return [part.tolist() for part in batch[column].split(batch.lengths.tolist())]


MORE = Turn(0.25, done=False, observation="+b")
END = Turn(1.0)


def test_a_turn_begins_with_all_ids_before_it_and_what_stands_between_is_no_action():
    engine = Engine("x", "yy", cut={(0, 1)})
    batch, environments = play(engine, {0: [MORE, END], 1: [MORE, END], 2: [END]})
    second = engine.calls[1]
    assert [request.prompt_id for request in second] == [0, 1], "an episode that has ended is not sampled again"
    expected = [
        [*encode("q0x"), EOS, *encode("+b")],
        [*encode("q1x"), EOS, *encode("+b")],  # cut off: given the end that it lacks
    ]
    assert [list(request.token_ids) for request in second] == expected
    assert rows(batch, "token_ids")[:2] == [[*ids, *encode("yy"), EOS] for ids in expected]
    masks = ["001100111", "001000111", "0011"]
    assert rows(batch, "action_mask") == [[mark == "1" for mark in mask] for mask in masks]
    for mask, versions, logs in zip(
        *(rows(batch, name) for name in ("action_mask", "weight_version", "rollout_log_probs")), strict=True
    ):
        places = [place if acted else -1 for place, acted in enumerate(mask)]
        assert versions == places, "each token has the version that it was sampled with"
        assert logs == [float(-place) if place >= 0 else 0.0 for place in places]
    assert rows(batch, "turn_rewards")[0] == [0, 0, 0, 0.25, 0, 0, 0, 0, 1.0]
    assert rows(batch, "turn_rewards")[1] == [0, 0, 0.25, 0, 0, 0, 0, 0, 1.0]
    assert batch["turns"].tolist() == [2, 2, 1]
    answers = [(answer.text, answer.finished) for answer in environments.asked[1][1].answers]
    assert answers == [("x", False), ("yy", True)]


def test_an_episode_that_failed_has_no_reward_and_the_others_go_on(project_log):
    failed = Failed(EpisodeFailure.LATE, "did not answer within 1 s")
    batch, _ = play(Engine("x", "y"), {0: [MORE, END], 1: [MORE, failed], 2: [failed]})
    totals = [sum(row) for row in rows(batch, "turn_rewards")]
    assert totals[0] == 1.25
    assert math.isnan(totals[1])
    assert math.isnan(totals[2]), "a failure is never a reward of 0"
    assert batch["episode_failure"].tolist() == [0, EpisodeFailure.LATE, EpisodeFailure.LATE]
    assert "1 of 2 episodes failed in a turn, such as sample 0 of prompt 1: it did not answer" in project_log.getvalue()


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["plain", "conversation"])
def test_an_observation_that_no_prompt_can_be_made_of_fails_its_own_episode(kind, project_log):
    outcomes = {0: [Turn(0.25, False, [{"role": "system", "content": "x"}]), END], 1: [MORE, END]}
    tokenizer = make_byte_pair_tokenizer(iter(["abc"]), 259)
    tokenizer.chat_template = REFUSING
    user = ({"role": "user", "content": "q"},) if kind == "conversation" else None
    prompts = {n: TokenizedPrompt(n, "q", tuple(encode("q")), messages=user) for n in outcomes}
    player = EpisodePlayer(Environments(outcomes), Bridge(ChatFormat(tokenizer)), Limits(4, 100), [EOS], "mine")
    requests = make_requests([(n, encode("q")) for n in outcomes], samples_per_prompt=1, max_new_tokens=8)
    try:
        batch = player.play(requests, prompts, Engine("x", "y"), run_seed=7, step=3)
    except Exception as error:
        pytest.fail(f"one observation ended the run: {error!r}")
    assert batch["episode_failure"].tolist() == [EpisodeFailure.UNREADABLE, 0]
    assert batch["turns"].tolist() == [1, 2], "the other goes on"
    totals = [sum(row) for row in rows(batch, "turn_rewards")]
    assert math.isnan(totals[0]) and totals[1] == 1.25
    reason = "no system here" if kind == "conversation" else "return a text"
    said = project_log.getvalue()
    assert "1 of 2 episodes failed in a turn, such as sample 0 of prompt 0" in said and reason in said


def test_limits_end_an_episode_and_say_which():
    batch, _ = play(Engine("x", "y"), {0: [MORE, MORE]}, turns=2)
    assert batch["finish_reason"].tolist() == [FinishReason.ABORT]
    assert batch["turns"].tolist() == [2]
    batch, _ = play(Engine("x", "y"), {0: [MORE, END]}, tokens=6)  # 2 + 2 sampled + 2 between: no room
    assert batch["finish_reason"].tolist() == [FinishReason.LENGTH]
    engine = Engine("x", "y")
    play(engine, {0: [MORE, END]}, tokens=9)
    assert engine.calls[1][0].max_new_tokens == 3


def test_each_turn_has_a_seed_of_its_own_and_the_first_that_of_a_single_answer():
    engine = Engine("x", "y")
    _, environments = play(engine, {0: [MORE, END], 1: [MORE, END]}, seed=5, samples=2)
    seeds = [request.seed for call in engine.calls for request in call]
    assert len(set(seeds)) == 8
    assert seeds[:4] == [request_seed(5, 3, prompt, sample) for prompt in (0, 1) for sample in (0, 1)]
    again = Engine("x", "y")
    play(again, {0: [MORE, END], 1: [MORE, END]}, seed=5, samples=2)
    assert seeds == [request.seed for call in again.calls for request in call]
    tasks = [question.task.seed for question in environments.asked[0]]
    assert tasks[0] == tasks[1] != tasks[2], "samples of a prompt have the same environment"


def test_without_an_end_token_an_answer_keeps_its_last_token():
    _, environments = play(Engine("xy", cut={(0, 0)}), {0: [END]})
    assert environments.asked[0][0].answers[0].text == "xy"


@pytest.mark.parametrize("turns", [1, 3])
def test_columns_over_sequences_are_those_of_the_last_turn(turns):
    outcomes = {n: [MORE] * (turns - 1) + [END] for n in range(2)}
    batch, _ = play(Engine(*"xyz"), outcomes, samples=2)
    assert batch["prompt_id"].tolist() == [0, 0, 1, 1]
    assert batch["sample_index"].tolist() == [0, 1, 0, 1]
    assert torch.equal(batch["turns"], torch.full((4,), turns, dtype=torch.int32))


@pytest.mark.parametrize("turn", [0, 1, 9])
def test_an_episode_whose_prompt_was_set_aside_is_left_out_and_the_others_keep_their_own_answers(turn):
    """The rows come in another order too: an answer belongs to its prompt and sample, wherever it stands."""

    class SettingAside(Engine):
        def __call__(self, requests):
            batch = super().__call__(requests)
            rows = [
                row for row, prompt in enumerate(batch["prompt_id"].tolist()) if prompt != 1 or len(self.calls) <= turn
            ]
            return batch.select(rows[::-1])

    batch, _ = play(SettingAside("x", "y"), {n: [Turn(n / 4, False, f"{n}"), END] for n in range(3)}, samples=2)
    left = [0, 0, 2, 2] if turn < 2 else [0, 0, 1, 1, 2, 2]
    assert batch["prompt_id"].tolist() == left
    assert batch["sample_index"].tolist() == [0, 1] * (len(left) // 2)
    assert batch["turns"].tolist() == [2] * len(left)
    texts = [TOKENIZER.decode(ids) for ids in rows(batch, "token_ids")]
    end = TOKENIZER.eos_token
    assert texts == [f"q{n}x{end}{n}y{end}" for n in left]
    assert [sum(row) for row in rows(batch, "turn_rewards")] == [1 + n / 4 for n in left]


def test_where_every_prompt_was_set_aside_there_are_no_episodes_with_the_same_columns():
    whole, _ = play(Engine("x"), {0: [END]})
    none, environments = play(lambda requests: gather([], []), {0: [END], 1: [END]})
    assert len(none) == 0
    assert none.columns == whole.columns
    assert environments.asked == []


def test_the_set_that_each_token_was_sampled_from_stays_with_it():
    class Cutting(Engine):
        def __call__(self, requests):
            batch = super().__call__(requests)
            ids = [
                [token, turn]
                for token, turn in zip(batch["token_ids"].tolist(), [len(self.calls)] * batch.num_tokens, strict=True)
            ]
            sets = KeptSets.from_ids(ids, 10_000)
            sizes = torch.where(batch["action_mask"], sets.sizes, 0)
            words = sets.select(batch["action_mask"].nonzero()[:, 0]).words
            return batch.with_columns(kept_sizes=sizes, kept_words=words)

    batch, _ = play(Cutting("x", "yy"), {0: [MORE, END], 1: [END], 2: [MORE, END]})
    assert batch.kept is not None
    kept = batch.kept.mask(10_000)
    turns = [[1, 1, 2, 2, 2], [1, 1], [1, 1, 2, 2, 2]]
    for row, expected in enumerate(turns):
        start, stop = batch.offsets[row : row + 2].tolist()
        places = [place for place in range(start, stop) if batch["action_mask"][place]]
        tokens = batch["token_ids"][places].tolist()
        assert [set(kept[place].nonzero()[:, 0].tolist()) for place in places] == [
            {token, turn} for token, turn in zip(tokens, expected, strict=True)
        ]


def test_each_token_has_the_experts_of_the_turn_in_which_it_was_read_first():
    """The last token of an answer is read in the turn after it; that of the episode is never read."""

    class Routing(Engine):
        def __call__(self, requests):
            batch = super().__call__(requests)
            column = torch.full((batch.num_tokens, 1, 2), len(self.calls), dtype=torch.uint8)
            column[batch.offsets[1:] - 1] = 255
            return batch.with_columns(routed_experts=column)

    batch, _ = play(Routing("x", "yy"), {0: [MORE, END], 1: [END]})
    routed = [[token[0][1] for token in row] for row in rows(batch, "routed_experts")]
    assert routed == [[1, 1, 1, 2, 2, 2, 2, 2, 255], [1, 1, 1, 255]]
