"""An environment of the package verifiers, of two turns: guess a number, be told which way to go, guess again.

A run plays it through the adapter (docs/environments.md): rollout.environment.name=rlhf_ray.environments.verifiers:Verifiers
rollout.environment.parameters="{python: PYTHON, taskset: {id: guess_taskset}, folder: examples}" reward.function=environment
"""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf


class GuessData(vf.TaskData):
    number: int


class GuessTask(vf.Task[GuessData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """1 for a right first guess, 0.5 for a right second one."""
        guesses = [(one.content or "").strip() for one in trace.branches[-1].messages if one.role == "assistant"]
        return 1.0 / len(guesses) if guesses[-1] == str(self.data.number) else 0.0


class GuessTaskset(vf.Taskset[GuessTask]):
    def load(self) -> Iterator[GuessTask]:
        """Each number from 0 to 9 twice, under another prompt."""
        for prompt in ("Guess a number from 0 to 9.", "Which number from 0 to 9 do I think of?"):
            for number in range(10):
                yield GuessTask(GuessData(prompt=prompt, number=number), self.config.task)


class GuessEnv(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task: GuessTask, agents: vf.Agents) -> None:
        """Say after a wrong first guess which way to go."""
        async with agents.agent.interaction(task) as talk:
            guess, number = (await talk.turn()).last_reply, task.data.number
            if guess != str(number):
                hint = ("low" if int(guess) < number else "high") if guess.isdecimal() else "That is no number."
                await talk.turn(hint)


__all__ = ["GuessEnv", "GuessTaskset"]
