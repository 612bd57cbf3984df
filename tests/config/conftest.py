"""Small valid configs of every kind, and what is wrong with a config as a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.errors import ConfigError

MADE = "{shape: llama-tiny, tokenizer_from: world}"
TEXTS = {
    "sft": f"""
kind: sft
run: {{name: small}}
policy: {{model: {{make: {MADE}, dtype: fp32}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
data: {{world: {{}}}}
batch: {{sequences_per_update: 8}}
""",
    "rm": f"""
kind: rm
run: {{name: small}}
reward: {{model: {{make: {MADE}, dtype: fp32, head_init: inv_sqrt}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
data: {{world: {{}}}}
batch: {{pairs_per_update: 8}}
""",
    "distill": f"""
kind: distill
run: {{name: small}}
policy: {{model: {{make: {MADE}, dtype: fp32}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
teacher: {{make: {MADE}, dtype: fp32}}
data: {{world: {{}}}}
batch: {{sequences_per_update: 8}}
""",
    "dpo": f"""
kind: dpo
run: {{name: small}}
policy: {{model: {{make: {MADE}, dtype: fp32}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
data: {{world: {{}}}}
batch: {{pairs_per_update: 8}}
""",
    "ppo": f"""
kind: ppo
run: {{name: small}}
steps: 3
policy: {{model: {{make: {MADE}, dtype: fp32}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
critic: {{model: {{make: {MADE}, dtype: fp32, head_init: zero}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
reference: {{model: {{make: {MADE}, dtype: fp32}}}}
reward: {{model: {{make: {MADE}, dtype: fp32, head_init: inv_sqrt}}}}
rollout: {{dtype: fp32}}
data: {{world: {{}}}}
batch: {{prompts_per_step: 16, sequences_per_update: 8}}
""",
    "generate": f"""
kind: generate
run: {{name: small}}
model: {{path: org/name}}
reward: {{model: {{make: {MADE}, dtype: fp32, head_init: inv_sqrt}}}}
rollout: {{dtype: fp32, max_model_tokens: 512}}
data: {{world: {{}}}}
samples: 4
""",
    "serve": f"""
kind: serve
run: {{name: small}}
reward: {{model: {{make: {MADE}, dtype: fp32}}}}
""",
}


@pytest.fixture(params=TEXTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def texts() -> dict[str, str]:
    return dict(TEXTS)


Problems = Callable[..., list[str]]


@pytest.fixture
def problems() -> Problems:
    """The problems of a kind's small config under overrides; ``text`` replaces the config."""

    def find(
        kind: str = "ppo", *overrides: str, text: str | None = None, files: bool = False, wanted: str | None = None
    ) -> list[str]:
        return problems_of(TEXTS[kind] if text is None else text, overrides, files=files, wanted=wanted)

    return find


def problems_of(text: str, overrides: Sequence[str], *, files: bool, wanted: str | None) -> list[str]:
    try:
        parse_config(text, overrides, wanted, files=files)
    except ConfigError as error:
        return list(error.problems)
    return []
