"""Ids reach a reward model only where its tokenizer, and for conversations its chat template, is the policy's."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.tokenizers import fingerprint, make_tokenizer, template_fingerprint
from rlhf_ray.errors import RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.client import RewardClient
from rlhf_ray.rewards.function_process import FunctionProcess
from rlhf_ray.rewards.function_source import FunctionSource
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource, score_or_hold
from rlhf_ray.trainers.ppo.rewards import SHIPPED, RemoteScorer, make_reward_source

SAMPLE = TextSample(0, 0, "a prompt", "an answer", None, finished=True, token_ids=(1, 2))

CONFIG = """
kind: ppo
run: {name: small}
steps: 3
policy: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
critic: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
reward: REWARD
data: {world: {}}
batch: {prompts_per_step: 16, sequences_per_update: 8}
"""


class DescribedGroup:
    """A reward group that describes itself."""

    def __init__(self, **description: Any) -> None:
        self.description: Mapping[str, Any] = description

    def describe(self) -> Pending[Mapping[str, Any]]:
        return Pending.done(self.description)


def source(
    reward: str,
    group: DescribedGroup | None = None,
    *,
    conversations: bool = False,
    variables: Mapping[str, Any] | None = None,
    cleanup: ExitStack | None = None,
) -> Any:
    config: Any = parse_config(CONFIG.replace("REWARD", reward))
    groups: Any = {} if group is None else {"reward": group}
    forms: list[Any] = ["conversation" if conversations else "text"]
    return make_reward_source(
        config, groups, ChatFormat(POLICY, variables or {}), forms=forms, cleanup=cleanup or ExitStack()
    )


POLICY = make_tokenizer("world")
POLICY.chat_template = "{{ messages }}"
OTHER = copy.deepcopy(POLICY)
OTHER.chat_template = "{{ messages }} "
MODEL = "{model: {path: org/reward}}"


@pytest.mark.parametrize("conversations", [False, True])
def test_the_template_counts_where_there_are_conversations(conversations: bool) -> None:
    same = DescribedGroup(fingerprint=fingerprint(POLICY), template=template_fingerprint(POLICY))
    another = DescribedGroup(fingerprint=fingerprint(OTHER), template=template_fingerprint(OTHER))
    assert source(MODEL, same, conversations=conversations).policy is not None
    assert (source(MODEL, another, conversations=conversations).policy is None) is conversations


@pytest.mark.parametrize("conversations", [False, True])
def test_the_variables_of_the_template_count_as_the_template_does(conversations: bool) -> None:
    quiet = {"enable_thinking": False}
    same: dict[str, Any] = {"fingerprint": fingerprint(POLICY), "template": template_fingerprint(POLICY)}
    for mine, theirs in (({}, {}), (quiet, quiet), (quiet, {}), ({}, quiet)):
        group = DescribedGroup(**same, reads={"template_variables": theirs})
        passed = source(MODEL, group, conversations=conversations, variables=mine).policy is not None
        assert passed is (mine == theirs or not conversations)


@pytest.mark.parametrize("conversations", [False, True])
def test_another_tokenizer_reads_text(conversations: bool) -> None:
    group = DescribedGroup(fingerprint="another", template=template_fingerprint(POLICY))
    assert source(MODEL, group, conversations=conversations).policy is None


@pytest.mark.parametrize("recorded", [True, False])
def test_prompts_reach_a_model_in_the_form_that_it_reads(recorded: bool, project_log: io.StringIO) -> None:
    """Ids only in its own form; a text as turns, which is said; a conversation never as a text."""

    def read(form: str, *, conversations: bool) -> Any:
        same = {"fingerprint": fingerprint(POLICY), "template": template_fingerprint(POLICY)}
        group = DescribedGroup(**same, reads={"forms": [form], "scored_token": "end", "recorded": recorded})
        return source(MODEL, group, conversations=conversations)

    assert read("text", conversations=False).policy is not None
    assert read("conversation", conversations=True).policy is not None
    assert project_log.getvalue() == ""
    assert read("conversation", conversations=False).policy is None
    for part in ("reward: the prompts are plain texts", "as a turn of the user", "data.apply_chat_template=true"):
        assert part in project_log.getvalue()
    assert ("reward.form=text" in project_log.getvalue()) is not recorded
    with pytest.raises(
        RequestError, match="reward: the prompts are conversations, but the reward model reads plain texts"
    ):
        read("text", conversations=True)


@pytest.mark.parametrize("form", ["text", "conversation"])
def test_a_model_that_is_read_at_another_end_gets_text(form: str) -> None:
    """Tokenizers that differ in the end of sequence alone give every text the same ids."""
    same = {"fingerprint": fingerprint(POLICY), "template": template_fingerprint(POLICY)}
    for end, passed in (("<eos>", True), ("<pad>", False)):
        group = DescribedGroup(**same, reads={"forms": [form], "end_token": end})
        assert (source(MODEL, group, conversations=form == "conversation").policy is not None) is passed


def test_a_model_that_is_read_after_the_end_gets_messages() -> None:
    same = {"fingerprint": fingerprint(POLICY), "template": template_fingerprint(POLICY)}
    group = DescribedGroup(**same, reads={"forms": ["conversation"], "scored_token": "rendering"})
    assert source(MODEL, group, conversations=True).policy is None


def test_normalisation_needs_the_statistics_of_the_model() -> None:
    description = {"fingerprint": "", "template": ""}
    normalized = source(
        "{model: {path: org/reward}, normalize: true}", DescribedGroup(**description, mean=1.0, std=2.0)
    )
    assert isinstance(normalized, ModelSource) and (normalized.mean, normalized.std) == (1.0, 2.0)
    with pytest.raises(
        RequestError, match=r"reward.normalize is true, but the reward model's config.json has no mean and std"
    ):
        source("{model: {path: org/reward}, normalize: true}", DescribedGroup(**description, mean=None, std=None))


def test_functions_of_the_project_run_here_and_those_of_a_user_in_a_process_that_ends_with_the_run(
    tmp_path: Path,
) -> None:
    for name in SHIPPED:
        assert isinstance(source(f"{{function: {name}}}").scores, FunctionSource)
    (tmp_path / "mine.py").write_text("def f(responses):\n    return [1.0] * len(responses)\n")
    with ExitStack() as cleanup:
        mine = source(f"{{function: '{tmp_path / 'mine.py'}:f', samples_per_call: 3}}", cleanup=cleanup).scores
        assert isinstance(mine.caller, FunctionProcess) and mine.samples_per_call == 3
        process = mine.caller._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("status", "fault"),
    [(400, "model"), (401, "model"), (404, "model"), (413, "model"), (422, "model"), (501, "model"),
     (408, "source"), (429, "source"), (500, "source"), (502, "source"), (503, "source"), (None, "source")],
)  # fmt: skip
def test_a_backend_is_asked_again_only_where_that_may_help(status: int | None, fault: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if status is None:
            raise httpx.ConnectError("refused")
        return httpx.Response(status, text="said so")

    client = RewardClient("http://backend:1", hold_s=0.0, transport=httpx.MockTransport(answer))
    source = ModelSource(RemoteScorer(client), policy=None)
    clock = itertools.count()
    hold = score_or_hold(source, [SAMPLE], hold_s=2.5, clock=lambda: next(clock), sleep=lambda _: None)
    assert [result.fault for result in hold] == [fault]
    assert (len(asked) > 1) == (fault == "source")
