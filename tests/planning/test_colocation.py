"""All roles on the same GPUs: the order in which they come and go, against a slow account of the memory itself."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from rlhf_ray.planning.colocation.phases import Kind, Level, Move, Phase, Residents

A, W, ALL = Level.AWAY, Level.WEIGHTS, Level.ALL
NAMES = {"policy": Kind.POLICY, "critic": Kind.CRITIC, "reference": Kind.FROZEN, "reward": Kind.FROZEN}
ENGINES = {f"rollout/{number}": Kind.ENGINE for number in range(3)}
MAY_HOLD: Mapping[str, Mapping[str, int]] = {
    # Written out once more, by hand: parts on the device in each phase, 1 weights, 2 weights and the rest.
    "generate": {"policy": 0, "critic": 0, "reference": 0, "reward": 0, "rollout": 2},
    "score": {"policy": 2, "critic": 2, "reference": 2, "reward": 2, "rollout": 0},
    "learn": {"policy": 2, "critic": 2, "reference": 0, "reward": 0, "rollout": 0},
    "publish": {"policy": 1, "critic": 0, "reference": 0, "reward": 0, "rollout": 1},
}


class Gpu:
    """The memory of a GPU as it is, part by part. A move that fails has happened or not, or half: nobody knows."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.has: dict[str, int] = {}
        self.sizes: dict[str, tuple[float, float]] = {}

    def load(self, who: str) -> None:
        self.sizes.setdefault(who.partition("/")[0], (self.draw.uniform(1, 9), self.draw.uniform(1, 9)))
        self.has[who] = 2

    def move(self, move: Move, *, fails: bool) -> None:
        """What the libraries do; they refuse what they cannot do at once."""
        now, goal = self.has[move.who], int(move.goal)
        if move.who.startswith("rollout"):
            assert not (goal == 1 and now == 2), "vLLM cannot give up its cache alone"
        else:
            assert not (goal == 1 and now == 0), "DeepSpeed cannot take back weights alone"
        if not fails or self.draw.random() < 0.5:
            self.has[move.who] = goal

    def within_one_phase(self) -> bool:
        def fits(phase: Mapping[str, int]) -> bool:
            return all(parts <= phase[who.partition("/")[0]] for who, parts in self.has.items())

        return any(map(fits, MAY_HOLD.values()))

    def used(self) -> float:
        return sum(self._bytes(who, parts) for who, parts in self.has.items())

    def planned(self) -> float:
        return max(
            sum(self._bytes(who, phase[who.partition("/")[0]]) for who in self.has) for phase in MAY_HOLD.values()
        )

    def _bytes(self, who: str, parts: int) -> float:
        weights, rest = self.sizes[who.partition("/")[0]]
        return weights * (parts > 0) + rest * (parts > 1)


def enter(residents: Residents, gpu: Gpu, phase: Phase, *, failures: float) -> bool:
    """Make the moves into a phase, in a random order within a stage; whether none failed."""
    for stage in residents.changes(phase):
        moves = list(stage)
        gpu.draw.shuffle(moves)
        failed = False
        for move in moves:  # all begin before any ends
            residents.begin(move)
        for move in moves:
            fails = gpu.draw.random() < failures
            gpu.move(move, fails=fails)
            check(residents, gpu)
            failed |= fails
            if not fails:
                residents.done(move)
        if failed:
            return False
    return True


def check(residents: Residents, gpu: Gpu) -> None:
    assert gpu.within_one_phase(), f"on the device together: {gpu.has}"
    assert gpu.used() <= gpu.planned()
    assert all(parts <= residents.most(who) for who, parts in gpu.has.items()), "memory that nobody counts"


@pytest.mark.parametrize("seed", range(60))
def test_whatever_fails_dies_or_comes_back_no_two_lie_on_a_gpu_that_planning_did_not_allow_together(seed: int) -> None:
    gpu, residents, draw = Gpu(seed), Residents(), random.Random(-seed - 1)
    for who, kind in NAMES.items():
        assert enter(residents, gpu, Phase.SCORE, failures=0.0)
        residents.came(who, kind)
        gpu.load(who)
        check(residents, gpu)
    for who, kind in ENGINES.items():
        assert enter(residents, gpu, Phase.GENERATE, failures=0.0)
        residents.came(who, kind)
        gpu.load(who)
        check(residents, gpu)
    for _ in range(60):
        phase = draw.choice(list(Phase))
        if enter(residents, gpu, phase, failures=draw.choice([0.0, 0.3])):
            assert residents.serves(phase), "a phase has begun without what it needs"
            wanted = {who: MAY_HOLD[phase.value][who.partition("/")[0]] for who in gpu.has}
            assert gpu.has == wanted
        if draw.random() < 0.2:  # an engine dies, whatever it was doing, and is started again when there is room
            dead = draw.choice(sorted(ENGINES))
            residents.gone(dead)
            gpu.has.pop(dead, None)
            if draw.random() < 0.7 and enter(residents, gpu, Phase.GENERATE, failures=0.2):
                residents.came(dead, Kind.ENGINE)
                gpu.load(dead)
            check(residents, gpu)
    for phase in Phase:
        assert enter(residents, gpu, phase, failures=0.0), "no failure may keep a later phase from coming about"
        assert residents.serves(phase)


def loaded() -> Residents:
    residents = Residents()
    for who, kind in NAMES.items():
        residents.came(who, kind)
    run(residents, Phase.GENERATE)
    residents.came("rollout/0", Kind.ENGINE)
    return residents


def run(residents: Residents, phase: Phase) -> list[set[tuple[str, Level]]]:
    stages = residents.changes(phase)
    for stage in stages:
        for move in stage:
            residents.begin(move)
            residents.done(move)
    return [{(move.who, move.goal) for move in stage} for stage in stages]


def test_a_step_goes_from_one_phase_to_the_next_in_the_order_in_which_memory_comes_free() -> None:
    residents = loaded()
    assert run(residents, Phase.GENERATE) == []
    assert run(residents, Phase.SCORE) == [{("rollout/0", A)}, {(who, ALL) for who in NAMES}]
    assert run(residents, Phase.LEARN) == [{("reference", A), ("reward", A)}]
    assert run(residents, Phase.PUBLISH) == [{("policy", W), ("critic", A)}, {("rollout/0", W)}]
    assert run(residents, Phase.GENERATE) == [{("policy", A)}, {("rollout/0", ALL)}]


def test_where_the_policy_is_away_the_engines_make_room_for_all_of_it_before_it_publishes() -> None:
    residents = loaded()
    assert run(residents, Phase.PUBLISH) == [
        {("rollout/0", A)},
        {("policy", ALL)},
        {("policy", W)},
        {("rollout/0", W)},
    ]


def test_nobody_loads_a_model_beside_others_that_are_awake() -> None:
    residents = loaded()
    run(residents, Phase.LEARN)
    with pytest.raises(ValueError, match="rollout/1 loads its model while others are on its GPU"):
        residents.came("rollout/1", Kind.ENGINE)
    assert residents.most("rollout/1") == A
    run(residents, Phase.GENERATE)
    residents.came("rollout/1", Kind.ENGINE)
    assert residents.serves(Phase.GENERATE)


def test_an_engine_gives_up_its_cache_with_its_weights_and_takes_the_weights_back_alone() -> None:
    residents = Residents()
    residents.came("rollout/0", Kind.ENGINE)
    assert run(residents, Phase.PUBLISH) == [{("rollout/0", A)}, {("rollout/0", W)}]
