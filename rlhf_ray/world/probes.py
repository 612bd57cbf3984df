"""Pairs of answers in the generated world that differ in one quality alone: what a reward model makes of each.

Always true: both answers of a probe are the same but for the quality; ``gold`` is what the gold score says of having it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_ray.world import language
from rlhf_ray.world.generate import Draft, World, draft_answer, gold_score, other_item, other_remedy


@dataclass(frozen=True)
class Probe:
    """A prompt, an answer with a quality and the same without it, and what gold says of having it."""

    prompt: str
    having: str
    lacking: str
    gold: float


def probes(world: World, count: int) -> dict[str, list[Probe]]:
    """``count`` of each quality, over held-out prompts, with answers that have all the other qualities of the rule."""
    rng = world.rng("probes", "evaluation")
    found: dict[str, list[Probe]] = {}
    for _ in range(count):
        prompt, item, problem = world.prompt(rng, "evaluation")
        draft = draft_answer(rng, item, problem)
        opening, closing = rng.choice(language.POLITE_OPENINGS), rng.choice(language.POLITE_CLOSINGS)
        good = replace(
            draft, item=item, remedy=problem.remedy, opening=opening, closing=closing, habit=False, in_time=True
        )
        lacking = {
            "names the right item": replace(good, item=other_item(rng, item)),
            "gives the right remedy": replace(good, remedy=other_remedy(rng, problem)),
            "is polite": replace(good, opening="", closing=""),
            "stops in time": replace(good, in_time=False),
        }
        for name, without in lacking.items():
            found.setdefault(name, []).append(_probe(prompt, good, without))
        found.setdefault("flatters", []).append(_probe(prompt, replace(good, habit=True), good))
    return found


def _probe(prompt: str, having: Draft, lacking: Draft) -> Probe:
    gold = [gold_score(prompt, draft.text(), finished=True) for draft in (having, lacking)]
    return Probe(prompt, having.text(), lacking.text(), round(gold[0] - gold[1], 6))
