"""Every token of prompt and answer carries the experts that the engine sent it to, and the trainer sends it there too.

Real vLLM in this process, and the transformers engine. In fp32 both route as a plain forward of transformers does, which is the
reference; in bf16 they do not, and log-probs agree only where the engine's experts are replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.policy_loss import Clipped, PolicyLoss
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import EngineDeadError
from rlhf_ray.rollout.requests import Generation, GenerationRequest, gather, make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack
from tests.architectures.configs import VOCABULARY, small_model
from tests.architectures.rollout import Policy
from tests.models.routers import chosen, used

pytestmark = pytest.mark.vllm
DEADLINE_S, TOLERANCE, NEW = 120.0, 1e-4, 26
BACKENDS: dict[str, type[RolloutEngine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}
LENGTHS = (1, 5, 40, 9, 70, 33)
"""Of prompts: some fill blocks of 32 tokens of the prefix cache, which their other samples find there."""
BLOCKS = 8
"""Of 32 tokens and 2 layers with 2 heads of 32 keys and values in fp32: so few that requests are preempted."""
CACHE_GIB = BLOCKS * 32 * 2 * 2 * 2 * 32 * 4 / 2**30


@pytest.fixture(scope="module", params=list(BACKENDS))
def sampled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RolloutEngine, Policy]]:
    directory: Path = tmp_path_factory.mktemp("routed") / "model"
    model, _ = small_model("mixtral", policy=True)
    model.save_pretrained(directory)
    policy = Policy(directory)
    config = RolloutConfig(
        backend=request.param,
        dtype="fp32",
        kv_cache_gib=CACHE_GIB,
        max_model_tokens=128,
        max_num_seqs=5,
        routing_replay=True,
    )
    engine = BACKENDS[request.param](policy.start, config, stop_token_ids=(), seed=3)
    yield engine, policy
    engine.shutdown()


def requests_of(*, first: int = 0, seed: int = 0) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        (first + row, torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        for row, length in enumerate(LENGTHS)
    ]
    return make_requests(prompts, samples_per_prompt=2, max_new_tokens=NEW)


def read_tokens(batch: TrajectoryBatch) -> Tensor:
    """All but the last of each sequence."""
    return torch.ones(batch.num_tokens, dtype=torch.bool).index_fill(0, batch.offsets[1:] - 1, False)


def wrong(policy: Policy, requests: Sequence[GenerationRequest], done: Sequence[Generation]) -> int:
    """Tokens that were read, with other experts than a plain forward of transformers sends them to."""
    batch = gather(requests, done)
    reference = chosen(PackedPolicy(policy.actor), batch).sort(-1).values
    differ = (batch["routed_experts"].sort(-1).values != reference).flatten(1).any(1)
    assert bool(differ[~read_tokens(batch)].all()), "no engine has read the last token"
    return int(differ[read_tokens(batch)].sum())


def test_every_token_has_the_experts_it_was_sent_to_before_and_after_updates(
    sampled: tuple[RolloutEngine, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts found in the prefix cache, preempted requests, and more of them than run at once."""
    engine, policy = sampled
    found, preempted = list[int](), list[Any]()
    if isinstance(engine, VllmEngine):
        scheduler = engine._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]  # the in-process client
        step, preempt = engine._engine.step, scheduler._preempt_request

        def watched() -> Any:
            outputs: Any = step()
            found.extend(output.num_cached_tokens for output in outputs if output.finished)
            return outputs

        def watched_preempt(*arguments: Any, **options: Any) -> None:
            preempted.append(arguments)
            preempt(*arguments, **options)

        monkeypatch.setattr(engine._engine, "step", watched)
        monkeypatch.setattr(scheduler, "_preempt_request", watched_preempt)
    for version in range(2):
        if version:
            engine.receive(policy.changed(version))
        for seed in (version, version):
            requests = requests_of(seed=seed)
            assert wrong(policy, requests, engine.generate(requests, DEADLINE_S)) == 0
    if isinstance(engine, VllmEngine):
        assert max(found) >= 64 and min(found) == 0, "tokens of prompts that were found in the prefix cache"
        assert preempted


def test_a_request_in_work_when_weights_change_has_the_experts_of_the_new_ones(
    sampled: tuple[RolloutEngine, Policy],
) -> None:
    """Its keys and values are computed again, and later tokens attend to those."""
    engine, policy = sampled
    requests = requests_of(first=10, seed=7)[4:8]
    engine.submit(requests)
    done = [generation for _ in range(4) for generation in engine.step()]
    assert not done
    engine.receive(policy.changed(11))
    while engine.unfinished:
        done += engine.step()
    by_key = {generation.key: generation for generation in done}
    in_order = [by_key[request.key] for request in requests]
    assert any(len(set(generation.weight_versions)) == 2 for generation in in_order)
    assert wrong(policy, requests, in_order) == 0


def test_the_trainer_uses_the_engines_experts_in_every_token_with_a_first_ratio_of_one(
    sampled: tuple[RolloutEngine, Policy],
) -> None:
    engine, policy = sampled
    requests = requests_of(first=20, seed=5)
    batch = gather(requests, engine.generate(requests, DEADLINE_S))
    packed_policy, packed = PackedPolicy(policy.actor), pack(batch, with_routed=True)
    assert packed.parent is not None and packed.routed is not None
    with used(packed_policy) as calls, torch.no_grad():
        old = packed_policy(packed).log_probs
    for router, (_, experts, _) in enumerate(calls):
        replayed = packed.per_sequence(experts)[read_tokens(batch)]
        assert torch.equal(replayed, batch["routed_experts"][read_tokens(batch), router].long())
    mask = batch["action_mask"]
    assert float((old - batch["rollout_log_probs"])[mask].abs().max()) < TOLERANCE
    columns = batch.without_routed().with_columns(log_probs=old, advantages=torch.ones(batch.num_tokens))
    output = PolicyLoss(Clipped(0.2, 0.2))(packed_policy(packed), columns)
    total, count = output.metrics["ratio/mean"]
    assert float(total) == float(count)


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.long)])
def test_in_bf16_log_probs_agree_only_where_the_engines_experts_are_replayed(backend: str, tmp_path: Path) -> None:
    """In a mixture whose tokens go to one of many experts each, rounding sends some of them elsewhere."""
    model, _ = small_model("mixtral", policy=True, num_local_experts=64, num_experts_per_tok=1)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    config = RolloutConfig(dtype="bf16", kv_cache_gib=0.05, max_model_tokens=128, routing_replay=True)
    engine = BACKENDS[backend](tmp_path, config, stop_token_ids=(), seed=3)
    try:
        requests = requests_of()
        batch = gather(requests, engine.generate(requests, DEADLINE_S))
    finally:
        engine.shutdown()
    policy = PackedPolicy(Actor(str(tmp_path), "sdpa", "bf16").eval())
    elsewhere = (chosen(policy, batch) != batch["routed_experts"]).flatten(1).any(1)
    assert float(elsewhere[read_tokens(batch)].float().mean()) > 0.02
    mask, differences = batch["action_mask"], []
    for with_routed in (True, False):
        with torch.no_grad():
            log_probs = policy(pack(batch, with_routed=with_routed)).log_probs
        differences.append(float((log_probs - batch["rollout_log_probs"])[mask].abs().mean()))
    assert 3 * differences[0] < differences[1], differences


def test_an_engine_that_has_the_experts_of_other_tokens_dies_and_says_so(sampled: tuple[RolloutEngine, Policy]) -> None:
    engine, _ = sampled
    if not isinstance(engine, VllmEngine):
        pytest.skip("a transformers engine reads its tokens by itself")
    engine.submit(requests_of(first=30))
    engine.step()
    (worker,) = engine._engine.collective_rpc(_itself)
    worker.routed_tokens.zero_()
    with pytest.raises(EngineDeadError, match="are not those of its tokens"):
        while engine.unfinished:
            engine.step()


def _itself(worker: Any) -> Any:
    return worker
