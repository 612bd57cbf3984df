"""A reward model from a mixture of conversations and texts, in one process: stopped in the middle of an epoch and resumed it
continues at the very next pair, uses each as often as its source's weight says, and ends with the same bits.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, parse_config
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import ResumableStop
from rlhf_ray.models.weights.tiny_llama import make_model
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping
from rlhf_ray.trainers.supervised import reward_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIG = """
kind: rm
run: {{name: mixed, root: {root}, deterministic: true}}
reward:
  model: {{path: {model}, head_init: inv_sqrt, dtype: fp32}}
  engine: {{optimizer: {{learning_rate: 1.0e-3}}}}
data:
  sources: {{talks: {{path: {talks}}}, texts: {{path: {texts}, weight: 2.0}}}}
  evaluation_fraction: 0.25
  max_tokens: 64
  cache: {root}/cache
batch: {{pairs_per_update: 4, max_tokens_per_micro_batch: 256}}
epochs: 2
monitoring: {{ray_metrics: false}}
"""


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Eight pairs of conversations, eight of texts, and a small model whose tokenizer has a chat template."""
    talks, texts, model = tmp_path / "talks.jsonl", tmp_path / "texts.jsonl", tmp_path / "model"
    rows = [{"prompt": f"what is {number}?", "chosen": f"this {number}", "rejected": f"that {number}"}
            for number in range(16)]  # fmt: skip
    as_talk = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
        for row in rows[:8]
    ]  # fmt: skip
    for path, written in ((talks, as_talk), (texts, rows[8:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
    tokenizer = make_tokenizer(texts, 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    make_model("llama-tiny", len(tokenizer), seed=0, pad_token_id=0, bos_token_id=None, eos_token_id=1).save_pretrained(
        model
    )

    def load(name: str) -> Any:
        return parse_config(
            CONFIG.format(root=tmp_path, model=model, talks=talks, texts=texts), [f"run.name={name}"], files=True
        )

    return load


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Source and ids of every pair that is trained on, in order."""
    seen: list[tuple[str, bytes]] = []
    make_batch = reward_model.make_pair_batch

    def spy(examples: Any) -> Any:
        seen.extend((example.source, bytes(example.chosen.data)) for example in examples)
        return make_batch(examples)

    monkeypatch.setattr(reward_model, "make_pair_batch", spy)
    return seen


def start(config: Any) -> RunDirectory:
    return RunDirectory.create(Path(config.run.root) / config.run.name, dump_config(config))


def train(config: Any, run: RunDirectory, checkpoint: Any = None) -> None:
    reward_model.train_reward_model(config, run, checkpoint, place=ThisProcess(config.cluster))


def test_a_mixture_that_is_stopped_anywhere_resumes_to_the_same_pairs_and_bits(
    config: Any, used: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start(config("whole"))
    train(config("whole"), whole)
    undisturbed = list(used)
    weights = load_file(whole.final / "model.safetensors")
    updates = int(max(line["update"] for line in whole.metrics.read() if "update" in line))
    assert Counter(Counter(undisturbed).values()) == {2: sum(name == "talks" for name, _ in set(undisturbed)),
                                                      4: sum(name == "texts" for name, _ in set(undisturbed))}  # fmt: skip
    assert len(set(undisturbed)) == 12, "four of sixteen prompts are held out"
    for stop in range(1, updates):
        used.clear()
        job = config(f"stopped-{stop}")
        stopped = start(job)
        monkeypatch.setattr(stopping._stop, "is_set", lambda stop=stop: len(used) >= 4 * stop)
        with pytest.raises(ResumableStop):
            train(job, stopped)
        monkeypatch.setattr(stopping._stop, "is_set", lambda: False)
        assert len(used) == 4 * stop
        stopped.release()
        again, checkpoint = RunDirectory.resume(stopped.path)
        assert checkpoint is not None and checkpoint.step == stop
        train(job, again, checkpoint)
        assert used == undisturbed
        resumed = load_file(again.final / "model.safetensors")
        assert resumed.keys() == weights.keys()
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)
