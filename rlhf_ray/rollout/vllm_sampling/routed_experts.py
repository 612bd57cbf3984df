"""The experts to which a vLLM engine sent each token of a prompt and its answer.

Invariants: a finished request has the experts of every token that was read, all but its last; each was written by the pass
that wrote the token's keys and values, which all later tokens attend to. So a token that was found in the prefix cache has
the experts of the request that computed it, and one that was computed again, after preemption or an update of the weights,
those of the last time. Where they are not those of the request's own tokens, the engine dies of a :class:`ValueError`.

On a GPU vLLM 0.32 returns them itself (``enable_return_routed_experts``, ``output.routed_experts``); that has not run on a
GPU yet. Its runner on CPU refuses that, so there the callback of each router (``BaseRouter.set_capture_fn`` of a
``MoERunner``) writes what it chose to where the token's keys and values lie: ``ForwardContext.slot_mapping`` says it during
a pass, and the request's row of ``model_runner.input_batch.block_table`` after it. ``tests/rollout/test_routed_experts.py``
fails when any of this changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.config.files.sampled import SLIDES
from rlhf_ray.errors import RequestError
from rlhf_ray.trajectories.routed_experts import experts_dtype

Experts = NDArray[Any]
"""Of some tokens: (tokens, routers, experts of a token)."""


class RoutedInWorker:
    """The part of a worker extension that remembers the experts of every token whose keys and values the worker holds."""

    model_runner: Any

    def routed_layers(self) -> tuple[list[int], int]:
        """The numbers of the layers that have a router, and how many experts a router has."""
        runners = self._mixtures()
        experts = max((runner.router.global_num_experts for runner in runners), default=0)
        return sorted(runner.layer_id for runner in runners), experts

    def watch_routers(self) -> str | None:
        """Look at all routers from now on; returns what is against it."""
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        groups = self.model_runner.kv_cache_config.kv_cache_groups
        whole = [place for place, group in enumerate(groups) if isinstance(group.kv_cache_spec, FullAttentionSpec)]
        if not whole:
            return SLIDES
        self.routed_group = whole[0]
        self.routed_layer = groups[self.routed_group].layer_names[0]
        runners = sorted(self._mixtures(), key=lambda runner: runner.layer_id)
        slots = self.model_runner.kv_cache_config.num_blocks * groups[self.routed_group].kv_cache_spec.block_size
        shape = (slots, len(runners), runners[0].router.top_k)
        self.routed_experts = torch.zeros(shape, dtype=experts_dtype(self.routed_layers()[1]))
        self.routed_tokens = torch.zeros(slots, dtype=torch.int32)
        for place, runner in enumerate(runners):
            if not isinstance(runner.router, BaseRouter):
                return f"vLLM's {type(runner.router).__name__} does not say what it chooses"
            runner.router.set_capture_fn(partial(self._remember_routed, place))
        return None

    def take_routed(self, request: str, tokens: int) -> tuple[Experts, NDArray[np.int32]] | None:
        """The experts of the first ``tokens`` tokens of a request that has just finished, and the ids of these tokens.

        None where the request is not known.
        """
        batch = self.model_runner.input_batch
        row = next((row for name, row in batch.req_id_to_index.items() if name.rpartition("-")[0] == request), None)
        if row is None:
            return None
        table = batch.block_table[self.routed_group]
        places = np.arange(tokens)
        blocks = table.get_numpy_array()[row, places // table.block_size].astype(np.int64)
        slots = torch.from_numpy(blocks * table.block_size + places % table.block_size)
        return self.routed_experts[slots].numpy(), self.routed_tokens[slots].numpy()

    def _mixtures(self) -> list[Any]:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        return [module for module in self.model_runner.model.modules() if isinstance(module, MoERunner)]

    def _remember_routed(self, place: int, chosen: Tensor) -> None:
        from vllm.forward_context import get_forward_context

        mapping: Any = get_forward_context().slot_mapping
        if not mapping:  # a pass that only warms up
            return
        slots = mapping[self.routed_layer][: len(chosen)]
        real = slots >= 0  # padding has none
        slots = slots[real]
        self.routed_experts[slots, place] = chosen[real].to(self.routed_experts.dtype)
        if place == 0:
            self.routed_tokens[slots] = self.model_runner.input_ids.gpu[: len(chosen)][real]


class RoutedInEngine:
    """How an engine comes by the experts of its requests; raises :class:`RequestError` for a model of which it gets none."""

    def __init__(self, engine: Any, *, on_cpu: bool) -> None:
        self._engine = engine
        self._on_cpu = on_cpu
        self._layers, self._experts = engine.collective_rpc("routed_layers")[0]
        problem = None if self._layers else "vLLM finds no router in this model"
        if problem is None and on_cpu:
            problem = engine.collective_rpc("watch_routers")[0]
        if problem is not None:
            raise RequestError(f"rollout.routing_replay is true, but {problem}: set it to false")

    def take(self, request: str, output: Any, prompt: Sequence[int]) -> Experts:
        """Return the experts of all tokens of a finished request but the last: (tokens - 1, routers, experts of a token).

        Raises :class:`ValueError` where they are not those of its tokens.
        """
        read = [*prompt, *output.token_ids][:-1]
        if not self._on_cpu:
            routed: Experts = output.routed_experts
            if len(routed) != len(read):
                raise ValueError(f"vLLM gave the experts of {len(routed)} tokens, but it read {len(read)}")
            return torch.from_numpy(routed[:, self._layers].astype(np.int16)).to(experts_dtype(self._experts)).numpy()
        answers = self._engine.collective_rpc("take_routed", args=(request, len(read)))
        experts, tokens = answers[0] or (np.zeros(0), np.zeros(0))  # all workers of an engine route alike
        if tokens.tolist() != read:
            raise ValueError(f"the experts that vLLM's routers chose for request {request} are not those of its tokens")
        return experts
