"""A reward backend that demands a token gets the first one of ``reward.token_file``, however that file is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource
from rlhf_ray.serving.auth import TokenFile
from rlhf_ray.serving.server import WebServer

from ..serving.services import Lengths, service
from .test_reward_sources import source

TOKEN, OTHER = "first-token-of-two", "second-token-of-two"
FILES = {
    "bare": f"{TOKEN}\n",
    "named": f"ppo:{TOKEN}\n",
    "several": f"{TOKEN}\n{OTHER}\n",
    "several named": f"ppo:{TOKEN}\nevaluation:{OTHER}\n",
    "comments and blank lines": f"# ours\n\n  ppo:{TOKEN}  \n# theirs\n{OTHER}\n",
    "no end of line": TOKEN,
}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A backend that scores by length, for whoever has one of two tokens."""
    (tmp_path / "served_tokens").write_text(f"a:{TOKEN}\nb:{OTHER}\n")
    config = ServeConfig(kind="serve", run=RunConfig(name="test"), reward=ScoringRole(model=ModelConfig(path="model")))
    server = WebServer("127.0.0.1", 0)
    server.start(service(config, Lengths(), keys=TokenFile(str(tmp_path / "served_tokens"))))
    yield server.address
    server.stop()


def sample(prompt: str, response: str) -> Any:
    return TextSample(
        prompt_id=0, sample_index=0, prompt=prompt, response=response, label=None, finished=True, source="",
        token_ids=(1, 2), messages=None,
    )  # fmt: skip


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_run_gets_its_rewards_with_a_token_from_a_file(address: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens").write_text(content)
    with ExitStack() as cleanup:
        rewards = source(f"{{url: '{address}', token_file: '{tmp_path / 'tokens'}'}}", cleanup=cleanup)
        assert isinstance(rewards, ModelSource)
        results = rewards.score([sample("ab", "c"), sample("a", "")]).result()
    assert [result.reward for result in results] == [3.0, 1.0]


def test_without_a_token_file_the_backend_refuses(address: str) -> None:
    with pytest.raises(RequestError, match="refuses without a token"):
        source(f"{{url: '{address}'}}")
