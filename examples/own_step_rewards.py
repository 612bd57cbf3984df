"""A reward model of steps with step tokens, such as Math-Shepherd (https://arxiv.org/abs/2312.08935), as a reward source.

    rlhf-ray train ppo CONFIG reward='{source: examples/own_step_rewards.py:StepTokens, parameters: {path: MODEL}, steps: sum}'

The model reads a step token after each step, and there says by two of its tokens how good the step is. It runs in the driver's
process, on the device that ``device`` names, which must have room for it. An answer without text has no reward:
``reward.on_failure: drop`` leaves its prompt out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.errors import RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.steps.placement import SteppedResult


class StepTokens:
    """The probability of ``good`` over ``bad`` at the step token of each step; a step ends with ``separator``."""

    reads = "text, by a model with step tokens"

    def __init__(
        self,
        path: str,
        step_token: str = "ки",
        good: str = "+",
        bad: str = "-",
        separator: str = "\n",
        device: str = "cpu",
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
        self.separator = separator
        self.step, self.good, self.bad = (self._id(path, token) for token in (step_token, good, bad))

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        return Pending(lambda: [self._score(sample) for sample in samples])

    def _id(self, path: str, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise RequestError(
                f"{token!r} is {len(ids)} tokens of {path}, not one: name a token that the model was trained with"
            )
        return int(ids[0])

    @torch.inference_mode()
    def _score(self, sample: TextSample) -> ScoreResult:
        ids, places, ends, end = self.tokenizer.encode(sample.prompt), [], [], 0
        for step in self._split(sample.response):
            end += len(step)
            ids += [*self.tokenizer.encode(step, add_special_tokens=False), self.step]
            places.append(len(ids) - 1)
            ends.append(end)
        if not places:
            return ScoreResult.failed("the answer has no step, since it has no text")
        logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, places]
        chances = logits[:, [self.good, self.bad]].float().softmax(-1)[:, 0].tolist()
        return SteppedResult.of_steps(tuple(zip(ends, chances, strict=True)))

    def _split(self, text: str) -> list[str]:
        parts = text.split(self.separator)
        return [step for step in (*(part + self.separator for part in parts[:-1]), parts[-1]) if step]
