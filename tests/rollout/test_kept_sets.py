"""Engines that cut their distribution say from which tokens each one was sampled, and the log-probs are over those.

Real vLLM in this process. The sets are compared with a slow reference that sorts the logits of plain forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM

from rlhf_ray.algorithms.policy_loss import Clipped, PolicyLoss
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import EngineDeadError
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.requests import Generation, GenerationRequest, gather, make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import publish
from rlhf_ray.trajectories.packing import SHORTEST_SHARED, pack

from .llamas import VOCABULARY, make_llama, weights_of

pytestmark = pytest.mark.vllm
TEMPERATURE, DEADLINE_S, TOLERANCE = 0.9, 120.0, 1e-4
BACKENDS: dict[str, type[RolloutEngine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}
CUTS = {"top_p": 0.9, "top_k": 20, "min_p": 0.05}


@pytest.fixture(scope="module", params=list(BACKENDS))
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], RolloutEngine]]:
    """One engine, and another after it died."""
    directory: Path = tmp_path_factory.mktemp("kept")
    make_llama(0).save_pretrained(directory)
    config = RolloutConfig(
        dtype="fp32", temperature=TEMPERATURE, kv_cache_gib=0.1, max_model_tokens=256, max_num_seqs=5, **CUTS
    )
    made: list[RolloutEngine] = []

    def alive() -> RolloutEngine:
        if not made or made[-1].probe().dead is not None:
            for dead in made:
                dead.shutdown()
            made.append(BACKENDS[request.param](directory, config, stop_token_ids=(), deterministic=True))
        return made[-1]

    yield alive
    made[-1].shutdown()


@pytest.fixture
def engine(engines: Callable[[], RolloutEngine]) -> RolloutEngine:
    return engines()


def requests_of(*, greedy: bool = False, first: int = 0, count: int = 4) -> list[GenerationRequest]:
    prompts = [(first + row, [2 + row, 5, 9][: 1 + row % 3]) for row in range(count)]
    return make_requests(prompts, samples_per_prompt=2, max_new_tokens=9, run_seed=0, greedy=greedy)


def test_the_trainer_has_the_engines_log_probs_a_first_ratio_of_one_and_the_gradient_over_the_sets(
    engine: RolloutEngine,
) -> None:
    """On packs that share their prompts, against plain forwards of one sequence each, with autograd over what was kept."""
    prompts = [(row, [2 + (row + place) % 50 for place in range(SHORTEST_SHARED + row)]) for row in range(3)]
    requests = make_requests(prompts, samples_per_prompt=3, max_new_tokens=9, run_seed=1)
    batch = gather(requests, engine.generate(requests, DEADLINE_S))
    policy = PackedPolicy(Actor(str(engine.model_dir), "sdpa", "fp32"))
    packed, mask = pack(batch, with_kept=True), batch["action_mask"]
    assert packed.parent is not None
    with torch.no_grad():
        old = policy(packed, TEMPERATURE).log_probs
    assert float((old - batch["rollout_log_probs"])[mask].abs().max()) < TOLERANCE
    with torch.no_grad():
        uncut = policy(pack(batch), TEMPERATURE).log_probs
    assert float((uncut - batch["rollout_log_probs"])[mask].abs().max()) > 0.05

    advantages = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    columns = batch.without_kept().with_columns(log_probs=old, advantages=advantages)
    outputs = policy(packed, TEMPERATURE, with_entropy=True)
    output = PolicyLoss(Clipped(0.2, 0.2), entropy_coefficient=0.1)(outputs, columns)
    total, count = output.metrics["ratio/mean"]
    assert float(total) == float(count) and float(output.metrics["approximate_kl"][0]) == 0.0

    plain = policy.actor.model
    parameters = list(plain.parameters())
    ours = torch.autograd.grad(output.loss, parameters)
    terms = []
    cuts, kept = batch.offsets.tolist(), batch.kept
    assert kept is not None
    for row, request in enumerate(requests):
        ids = batch["token_ids"][cuts[row] : cuts[row + 1]]
        logits = plain(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE
        for place in range(len(request.token_ids), len(ids)):
            inside = kept.select(slice(cuts[row] + place, cuts[row] + place + 1)).mask(VOCABULARY)[0]
            log_p = logits[place - 1][inside].log_softmax(-1)
            chosen = log_p[int(inside[: ids[place]].sum())]
            terms.append(-advantages[cuts[row] + place] * chosen + 0.1 * (log_p.exp() * log_p).sum())
    for mine, theirs in zip(ours, torch.autograd.grad(torch.stack(terms).sum(), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def scaled_logits(model: LlamaForCausalLM, request: GenerationRequest, generation: Generation) -> torch.Tensor:
    token_ids = torch.tensor([request.token_ids + generation.token_ids])
    return model(input_ids=token_ids).logits[0, len(request.token_ids) - 1 : -1].double() / TEMPERATURE


def reference_set(logits: torch.Tensor) -> set[int]:
    """min-p, then top-k, then the smallest set of the rest whose probability reaches top_p."""
    p = logits.softmax(-1)
    rows = [
        (float(probability), token) for token, probability in enumerate(p) if probability >= CUTS["min_p"] * p.max()
    ]
    rows = sorted(rows, reverse=True)[: int(CUTS["top_k"])]
    total, reached, kept = sum(probability for probability, _ in rows), 0.0, set()
    for probability, token in rows:
        if reached >= CUTS["top_p"] * total:
            break
        kept.add(token)
        reached += probability
    return kept


def check_sets(model: LlamaForCausalLM, requests: list[GenerationRequest], generations: list[Generation]) -> set[int]:
    """Compare sets and log-probs with the reference; returns the sizes of the sets."""
    sizes = set()
    for request, generation in zip(requests, generations, strict=True):
        assert generation.kept is not None and len(generation.kept) == len(generation.token_ids)
        logits, mask = scaled_logits(model, request, generation), generation.kept.mask(VOCABULARY)
        for own, inside in zip(logits, mask, strict=True):
            kept = set(inside.nonzero()[:, 0].tolist())
            assert kept == reference_set(own)
            sizes.add(len(kept))
        over_set = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
        expected = over_set.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert float((expected - torch.tensor(generation.log_probs)).abs().max()) < TOLERANCE
        whole = logits.log_softmax(-1).gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert float((expected - whole).min()) > 0.0, "over the whole vocabulary every log-prob is lower"
    return sizes


def test_every_token_has_the_set_it_was_sampled_from_before_and_after_an_update(engine: RolloutEngine) -> None:
    """More requests than run at once, and an update while some are in work: rows move between requests from step to step."""
    requests = requests_of()
    assert len(check_sets(make_llama(0), requests, engine.generate(requests, DEADLINE_S))) > 3, "sets of many sizes"
    early, late = requests_of(first=10), requests_of(first=20)
    engine.submit(early)
    done = [generation for _ in range(3) for generation in engine.step()]
    assert not done
    engine.submit(late)
    engine.receive(publish(1, weights_of(make_llama(1))))
    while engine.unfinished:
        done += engine.step()
    by_key, in_the_middle = {generation.key: generation for generation in done}, False
    for request in [*early, *late]:
        generation = by_key[request.key]
        changed = generation.weight_versions.index(1)
        in_the_middle |= changed > 0
        for version, part in ((0, slice(changed)), (1, slice(changed, None))):
            logits = scaled_logits(make_llama(version), request, generation)[part]
            assert generation.kept is not None
            for own, inside in zip(logits, generation.kept.mask(VOCABULARY)[part], strict=True):
                assert set(inside.nonzero()[:, 0].tolist()) == reference_set(own)
    assert in_the_middle
    engine.receive(publish(0, weights_of(make_llama(0))))


def test_an_engine_says_how_it_computes_as_its_library_has_settled_it(engine: RolloutEngine) -> None:
    import vllm

    engine.receive(publish(0, weights_of(make_llama(0))))
    record, is_vllm = engine.execution(), isinstance(engine, VllmEngine)
    assert record == Execution(
        dtype="fp32", head="fp32", log_probs="processed_logprobs", temperature=TEMPERATURE, **CUTS,
        attention="CPU_ATTN" if is_vllm else "sdpa", vocabulary=VOCABULARY, lora="merged", context=256,
        transport="object_store", torch=torch.__version__, transformers=transformers.__version__,
        tokenizers=tokenizers.__version__, vllm=vllm.__version__ if is_vllm else None,
    )  # fmt: skip
    if is_vllm:
        settled = engine._engine.vllm_config.model_config
        settled.logprobs_mode = "raw_logprobs"
        assert engine.execution() == replace(record, log_probs="raw_logprobs"), "not what it was asked for"
        settled.logprobs_mode = "processed_logprobs"


def test_greedy_requests_are_cut_by_nothing_beside_others_that_are(engine: RolloutEngine) -> None:
    drawn, greedy = requests_of(count=2), requests_of(greedy=True, first=30, count=2)
    generations = engine.generate([*drawn, *greedy], DEADLINE_S)
    check_sets(make_llama(0), drawn, generations[: len(drawn)])
    for generation in [*generations[len(drawn) :], *engine.generate(greedy, DEADLINE_S)]:
        assert generation.kept is not None and not generation.kept.sizes.any()


def test_what_was_aborted_leaves_no_sets(engine: RolloutEngine) -> None:
    requests = requests_of()
    engine.submit(requests)
    engine.step()
    tickets = list(engine._in_work) if isinstance(engine, VllmEngine) else []
    assert engine.abort() == len(requests)
    for ticket in tickets:
        assert engine._engine.collective_rpc("take_kept", args=(ticket,)) == [None], "a set would stay for ever"
    check_sets(make_llama(0), requests, engine.generate(requests, DEADLINE_S))


def test_an_engine_that_lost_a_set_dies_and_says_so(engine: RolloutEngine) -> None:
    if not isinstance(engine, VllmEngine):
        pytest.skip("a transformers engine samples by itself")
    engine.submit(requests_of())
    engine.step()
    engine._engine.collective_rpc("forget_kept")
    with pytest.raises(EngineDeadError, match="but it answered with 9 tokens"):
        while engine.unfinished:
            engine.step()
