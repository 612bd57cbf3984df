"""An environment of two turns: the policy guesses a number, is told whether it is too high or too low, and guesses again.

rollout.environment.name=examples/own_environment.py:Guess reward.function=environment
"""

from __future__ import annotations

from random import Random

from rlhf_ray.environments import Answer, Task, Turn


class Guess:
    """A right answer gets 1 at once, or half as much in the second turn."""

    def __init__(self, largest: int = 9) -> None:
        self.largest = largest

    def reset(self, task: Task) -> None:
        """Draw the number: the same for all samples of a prompt, so that they can be compared."""
        self.number = Random(task.seed).randint(0, self.largest)
        self.turn = 0

    def step(self, answer: Answer) -> Turn:
        """Compare."""
        self.turn += 1
        guess = answer.text.strip()
        if guess == str(self.number):
            return Turn(reward=1.0 / self.turn)
        if self.turn == 2 or not guess.isdigit():
            return Turn(reward=0.0)
        return Turn(reward=0.0, done=False, observation="low " if int(guess) < self.number else "high ")
