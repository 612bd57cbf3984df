"""The vLLM rollout engine: our own step loop around vLLM's in-process ``LLMEngine``.

Invariants:

- The engine lives in this process and dies with it, and so do its workers where ``tensor_parallel`` is above 1.
- It sees no text, because it has no tokenizer. It stops at the given stop tokens and returns them as actions.
- Log-probs are those at the sampling temperature over what ``rollout.min_p``, ``top_k`` and ``top_p`` keep. Where they cut,
  every token carries the set that was kept (``vllm_sampling/kept_sets.py``).
- With ``rollout.routing_replay`` tokens carry the experts that they were sent to (``vllm_sampling/routed_experts.py``).
- An engine that sleeps (``rollout.sleep``) is awake while it generates, and its weights are while they change. This has not run
  on a GPU yet.
- A request finds in the prefix cache only what the present weights computed. Requests in work when weights change are computed
  again with the new ones.
- In deterministic mode the same requests in the same order give the same bits, run after run.

vLLM changes the threads and process groups of its process: run one engine per process, and no trainer beside it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlhf_ray import environment
from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.sampled import adapter_refusal, sampling_refusal
from rlhf_ray.config.sections.models import Dtype, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import CapacityError, RequestError
from rlhf_ray.models.dtypes import LONG_NAMES, dtype_name
from rlhf_ray.planning.colocation.phases import Level
from rlhf_ray.planning.memory import sampling_parts, total
from rlhf_ray.planning.model_size import model_size
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.execution import versions
from rlhf_ray.rollout.requests import Generation, GenerationRequest
from rlhf_ray.rollout.vllm_sampling.kept_sets import KeptInEngine, sampling_cuts
from rlhf_ray.rollout.vllm_sampling.routed_experts import RoutedInEngine
from rlhf_ray.rollout.vllm_workers import shared, starting_workers, stay_eager
from rlhf_ray.rollout.wire import PublishedAdapter
from rlhf_ray.trajectories.columns import FinishReason

if TYPE_CHECKING:
    from vllm.config.model import ModelDType
    from vllm.lora.request import LoRARequest

FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


CACHED_TOKENS = 32
"""Tokens of a block of the prefix cache on a CPU, the fewest that vLLM takes there: shorter prompts are never found in it. By
itself it takes 128.
"""
WEIGHTS, CACHE = "weights", "kv_cache"
"""What vLLM's sleep mode calls the two parts of an engine that it can wake one by one."""


class VllmEngine(RolloutEngine):
    """Samples with vLLM."""

    def __init__(self, model_dir: str | Path, config: RolloutConfig, **settings: Any) -> None:
        """``settings`` are those of :class:`RolloutEngine`."""
        super().__init__(model_dir, config, **settings)
        on_cpu = self.device.type == "cpu"
        prepare_process(self.device)
        _refuse_what_vllm_gets_wrong(self.model_dir, on_cpu=on_cpu, adapter_rank=self.adapter_rank)
        if not on_cpu:
            require_room(self.model_dir, self._shapes, config, _gpu_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM probes deprecated names of torch while it is imported
            from vllm import LLMEngine
            from vllm.usage.usage_lib import UsageContext

            engine_args = self._engine_args(on_cpu)
            gc.freeze()  # vLLM collects garbage five times while it starts; what is imported by now never is any
            # The context chooses the sizes of a batch: those of vLLM's offline class are up to eight times the ones it
            # takes for an engine that nobody has named a use for.
            with starting_workers() as self._workers:
                try:
                    self._engine = LLMEngine.from_engine_args(engine_args, UsageContext.LLM_CLASS)
                except ValueError as error:
                    if "does not support LoRA" in str(error):
                        raise RequestError(f"{error} Set rollout.lora to merged") from error
                    raise
        self._engine.set_weight_version(str(self.weight_version))
        self.vocabulary = self._engine.vllm_config.model_config.get_vocab_size()
        self._asleep: set[str] = set()
        self._tickets = itertools.count()
        self._in_work: dict[str, GenerationRequest] = {}
        self._sent = False
        if on_cpu:
            self._engine.collective_rpc("sample_by_inverse_transform")
        self._kept = KeptInEngine(self._engine, vocabulary=self.vocabulary, on_cpu=on_cpu) if config.cuts else None
        self._routed = RoutedInEngine(self._engine, on_cpu=on_cpu) if config.routing_replay else None
        self._updates = 0
        self._adapter: LoRARequest | None = None

    def _engine_args(self, on_cpu: bool) -> Any:
        from vllm import EngineArgs
        from vllm.config import WeightTransferConfig

        from rlhf_ray.rollout import weight_transfer
        from rlhf_ray.rollout.weights.vllm_adapter import adapter_arguments

        config = self.config
        return EngineArgs(
            model=str(self.model_dir),
            skip_tokenizer_init=True,
            generation_config="vllm",  # sampling settings of the model's directory would change the distribution
            dtype=vllm_dtype(config.dtype),
            load_format="dummy" if self._awaits_weights else "auto",
            max_model_len=config.max_model_tokens,
            tensor_parallel_size=config.tensor_parallel,
            # Workers are children of this process, which holds their GPUs. By itself vLLM takes Ray's actors inside a placement
            # group, and those would wait for GPUs that this actor has.
            distributed_executor_backend="mp" if config.tensor_parallel > 1 else "uni",
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            seed=self.stream_seed,
            logprobs_mode="processed_logprobs",
            return_sampling_mask=config.cuts
            and not on_cpu,  # vLLM's runner on CPU has none; there we look at its sampler
            enable_return_routed_experts=config.routing_replay and not on_cpu,  # there we look at its routers
            # Eager and with a cache of known size, the CPU backend needs no warm-up pass.
            enforce_eager=on_cpu or self.deterministic,
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30) if on_cpu else None,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enable_sleep_mode=config.sleep,
            enable_prefix_caching=not self.deterministic,
            block_size=CACHED_TOKENS if on_cpu and not self.deterministic else None,
            # On CPU a request with a seed whose prompt is cut by a step's token budget ends the engine: vLLM winds its
            # generator back, which the CPU's cannot do. Uncut, prompts beyond the budget wait for the next step.
            enable_chunked_prefill=False if on_cpu else None,
            async_scheduling=False,  # a token sampled ahead would carry the version of the weights that came after it
            weight_transfer_config=WeightTransferConfig(backend=weight_transfer.BACKEND),
            worker_extension_cls=f"{weight_transfer.__name__}.{weight_transfer.RegisterInWorker.__name__}",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **({} if self.adapter_rank is None else adapter_arguments(self.adapter_rank)),
        )

    # Generating

    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        from vllm.inputs import tokens_input

        self._wake(WEIGHTS, CACHE)
        for request in requests:
            ticket = str(next(self._tickets))
            prompt = tokens_input(list(request.token_ids), cache_salt=self._cache_salt())
            self._engine.add_request(ticket, prompt, self._sampling(request), lora_request=self._adapter)
            self._in_work[ticket] = request

    def _cache_salt(self) -> str:
        """Requests share cached prefixes only under one salt: another one with every update, also to a version of before."""
        return f"weights {self.weight_version}, update {self._updates}"

    def _sampling(self, request: GenerationRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **sampling_cuts(self.config, greedy=request.greedy, on_cpu=self.device.type == "cpu"),
            max_tokens=request.max_new_tokens,
            seed=request.seed,
            ignore_eos=True,
            stop_token_ids=list(self.stop_token_ids),
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _advance(self) -> list[Generation]:
        finished: list[Any] = [output for output in self._engine.step() if output.finished]
        return [self._generation(output.request_id, output.outputs[0]) for output in finished]

    def _generation(self, ticket: str, output: Any) -> Generation:
        request = self._in_work.pop(ticket)
        token_ids = tuple(output.token_ids)
        if tuple(output.logprobs.token_ids) != token_ids:
            raise ValueError(f"vLLM gave log-probs of other tokens than it sampled for request {request.key}")
        versions = tuple(int(span.version) for span in output.weight_versions for _ in range(span.start, span.end))
        if len(versions) != len(token_ids):
            raise ValueError(f"vLLM gave {len(versions)} weight versions for {len(token_ids)} tokens of {request.key}")
        reason = FINISH_REASONS[output.finish_reason]
        kept = None if self._kept is None else self._kept.take(ticket, output, greedy=request.greedy)
        routed = None if self._routed is None else self._routed.take(ticket, output, request.token_ids)
        return Generation(*request.key, token_ids, tuple(output.logprobs.logprobs), versions, reason, kept, routed)

    def _running(self) -> int:
        return min(len(self._in_work), self._engine.vllm_config.scheduler_config.max_num_seqs)

    def _drop(self) -> None:
        self._engine.abort_request(list(self._in_work))
        if self._kept is not None:
            self._kept.forget()
        self._in_work.clear()

    # Weights

    def gpus(self) -> list[str]:
        """The UUID of the GPU of each worker; none on a CPU."""
        return [gpu for gpu in self._engine.collective_rpc("gpu") if gpu is not None]

    def _connect(self, transport: str, info: dict[str, Any]) -> None:
        self._engine.collective_rpc(
            "init_weight_transfer_engine", kwargs={"init_info": {"transport": transport, "info": info}}
        )

    def _begin_load(self) -> None:
        self._sent = False
        self._wake(WEIGHTS)
        self._engine.collective_rpc("start_weight_update")

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        if self._workers.processes:
            with shared(weights) as bucket:
                self._engine.collective_rpc("update_weights", kwargs={"update_info": {"weights": bucket}})
        else:
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"weights": weights}})

    def _take_sent(self, info: dict[str, Any]) -> None:
        self._sent = True
        self._engine.collective_rpc("update_weights", kwargs={"update_info": {"sent": info}})

    def _received(self) -> list[str]:
        return self._engine.collective_rpc("received_checksum") if self._sent else []

    def _end_load(self) -> None:
        self._engine.collective_rpc("finish_weight_update")
        self._adopt()

    def _load_adapter(self, name: str, adapter: PublishedAdapter) -> None:
        from rlhf_ray.rollout.weights.vllm_adapter import load_adapter

        self._wake(WEIGHTS)
        self._adapter = load_adapter(self._engine, name, adapter.config, adapter.read())
        self._adopt()

    def _adopt(self) -> None:
        self._updates += 1
        # Requests in work keep their salt: what they go on from is computed again, with the new weights.
        if self._in_work:
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(self.weight_version))

    # Sleeping

    def _rest(self) -> None:
        """Move the weights to the host and drop the cache. Weights are not dropped: evaluation may come before an update."""
        if self.config.sleep:
            self._engine.sleep(level=1)
            self._asleep = {WEIGHTS, CACHE}

    def _go_to(self, level: Level) -> None:
        if level is Level.AWAY:
            self._rest()
        else:
            self._wake(*((WEIGHTS,) if level is Level.WEIGHTS else (WEIGHTS, CACHE)))

    def _wake(self, *parts: str) -> None:
        needed = [part for part in parts if part in self._asleep]
        if needed:
            self._engine.wake_up(needed)
            self._asleep -= set(needed)

    # Life

    def _loaded(self) -> dict[str, Any]:
        import vllm

        config = self._engine.vllm_config
        model = config.model_config
        return {
            "dtype": dtype_name(cast("torch.dtype", model.dtype)),
            "head": dtype_name(model.head_dtype),
            "log_probs": str(model.logprobs_mode),
            "attention": ", ".join(
                sorted({name for names in self._engine.collective_rpc("attention") for name in names})
            ),
            "lora": "merged" if config.lora_config is None else "adapter",
            "quantization": model.quantization,
            "context": model.max_model_len,
            "vllm": vllm.__version__,  # the package for CPUs has another name
            **versions("torch", "transformers", "tokenizers"),
        }

    def _death(self) -> str | None:
        return self._workers.death()

    def _close(self) -> None:
        self._workers.restore_names()
        self._engine.engine_core.shutdown()
        del self._engine


def _refuse_what_vllm_gets_wrong(directory: Path, *, on_cpu: bool, adapter_rank: int | None) -> None:
    """Refuse a model whose log-probs would not be the trainer's, as ``check`` does where its directory is at hand."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    refused = sampling_refusal(config, on_cpu=on_cpu)
    if refused is None and adapter_rank is not None:
        refused = adapter_refusal(config, adapter_rank)
    if refused is not None:
        raise RequestError(f"{directory}: {refused}")


def require_room(model_dir: Path, shapes: Mapping[str, tuple[int, ...]], config: RolloutConfig, gpu_bytes: int) -> None:
    """Refuse an engine whose share of a GPU of ``gpu_bytes`` cannot hold the weights and one answer of full length.

    ``shapes`` are those of all weights of the model, by their names on disk. Raises :class:`CapacityError`.
    """
    size = model_size(Role(RoleConfig(model=ModelConfig(path=str(model_dir)))), shapes)
    if size is None:  # a config.json without the usual widths: vLLM measures what it needs
        return
    longest = config.max_model_tokens
    parts = list(
        sampling_parts(
            size, config.dtype, tensor_parallel=config.tensor_parallel, tokens=longest, longest=longest, sequences=1
        )
    )
    share, least = config.gpu_memory_utilization * gpu_bytes, total(parts, "GPU")
    if least > share:
        listed = ", ".join(f"{part.what} {part.bytes / 2**30:.2f}" for part in parts)
        raise CapacityError(
            f"rollout.gpu_memory_utilization is {config.gpu_memory_utilization:g}, which is {share / 2**30:.2f} GiB of a GPU "
            f"of {gpu_bytes / 2**30:.2f} GiB, but an engine needs {least / 2**30:.2f} GiB of it for one answer ({listed}; "
            f"rollout.dtype {config.dtype}, rollout.max_model_tokens {longest}, rollout.tensor_parallel "
            f"{config.tensor_parallel}): raise it, or rollout.tensor_parallel"
        )


def _gpu_bytes() -> int:
    """Memory of the GPU that an engine in this process gets, asked without opening it."""
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


def vllm_dtype(dtype: Dtype) -> ModelDType:
    """vLLM's name of a dtype."""
    return cast("ModelDType", LONG_NAMES[dtype])


def prepare_process(device: torch.device) -> None:
    """Set what vLLM reads when it is imported to compute on ``device``."""
    on_cpu = device.type == "cpu"
    environment.prepare(environment.for_process(device="cpu" if on_cpu else "cuda"))
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise RequestError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0 or unset: an engine lives in its caller's process")
    if on_cpu:
        stay_eager()
