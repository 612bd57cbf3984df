"""Episodes of two turns on the whole real stack, with two vLLM engines.

What must hold: engine and trainer give every sampled token of both turns the same log-prob, although the engine was asked turn
by turn and the trainer reads an episode at once; what the environment said between them is in every episode.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import metrics, run

CONFIG = Path(__file__).with_name("ppo_tiny.yaml")
ENVIRONMENT = '''
from rlhf_ray.environments import Turn

class Letters:
    """Two turns; each answer is worth its letters."""
    def reset(self, task):
        self.turns = 0
    def step(self, answer):
        self.turns += 1
        return Turn(float(len(answer.text)), done=self.turns == 2, observation=".")
'''
SETTINGS = ["policy.ranks=1", "policy.engine.zero=0", "algorithm.name=grpo", "critic=null", "reference=null", "steps=3",
            "reward={function: environment}", "rollout.max_model_tokens=96",
            "evaluation={prompts: 4}", "data.world={prompts: 64, evaluation_prompts: 4}",
            "batch={prompts_per_step: 8, samples_per_prompt: 2, sequences_per_update: 16, max_tokens_per_micro_batch: 512}",
            "checkpoint.every_steps=null", "run.name=turns"]  # fmt: skip


@pytest.mark.long
def test_both_turns_of_an_episode_have_the_same_log_probs_in_engine_and_trainer(tmp_path: Path) -> None:
    (tmp_path / "letters.py").write_text(ENVIRONMENT)
    environment = f"rollout.environment={{name: '{tmp_path}/letters.py:Letters', max_turns: 2}}"
    run("train", "ppo", CONFIG, f"run.root={tmp_path}", environment, *SETTINGS)
    lines = [line for line in metrics(tmp_path / "turns") if "length/turns" in line]
    assert [line["length/turns"] for line in lines] == [2.0] * 3
    assert all(line["rollout/log_prob_difference"] < 1e-4 for line in lines), "in fp32"
    texts = "".join(path.read_text() for path in (tmp_path / "turns" / "samples").glob("*"))
    rows = [json.loads(line) for line in texts.splitlines()]
    assert rows and all("." in row["response"] for row in rows)
