"""The vLLM rollout engine: our own step loop around vLLM's in-process ``LLMEngine``.

Invariants:

- The engine lives in this process and dies with it.
- It sees no text, because it has no tokenizer. It stops at the given stop tokens and returns them as actions.
- Log-probs are those of the whole distribution at the sampling temperature.
- In deterministic mode the same requests in the same order give the same bits, run after run.

vLLM changes the threads and process groups of its process: run one engine per process, and no trainer beside it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlhf_ray import environment
from rlhf_ray.config.files.sampled import sampling_refusal
from rlhf_ray.config.sections.models import Dtype
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.models.dtypes import LONG_NAMES
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.requests import Generation, GenerationRequest
from rlhf_ray.trajectories.columns import FinishReason

if TYPE_CHECKING:
    from vllm.config.model import ModelDType

FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VllmEngine(RolloutEngine):
    """Samples with vLLM."""

    def __init__(self, model_dir: str | Path, config: RolloutConfig, **settings: Any) -> None:
        """``settings`` are those of :class:`RolloutEngine`."""
        super().__init__(model_dir, config, **settings)
        on_cpu = self.device.type == "cpu"
        prepare_process(self.device)
        _refuse_what_vllm_gets_wrong(self.model_dir, on_cpu=on_cpu)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM probes deprecated names of torch while it is imported
            from vllm import LLMEngine

            engine_args = self._engine_args(on_cpu)
            gc.freeze()  # vLLM collects garbage five times while it starts; what is imported by now never is any
            self._engine = LLMEngine.from_engine_args(engine_args)
        self._engine.set_weight_version(str(self.weight_version))
        self.vocabulary = self._engine.vllm_config.model_config.get_vocab_size()
        self._tickets = itertools.count()
        self._in_work: dict[str, GenerationRequest] = {}
        self._sent = False

    def _engine_args(self, on_cpu: bool) -> Any:
        from vllm import EngineArgs
        from vllm.config import WeightTransferConfig

        from rlhf_ray.rollout import weight_transfer

        config = self.config
        return EngineArgs(
            model=str(self.model_dir),
            skip_tokenizer_init=True,
            generation_config="vllm",  # sampling settings of the model's directory would change the distribution
            dtype=vllm_dtype(config.dtype),
            max_model_len=config.max_model_tokens,
            tensor_parallel_size=config.tensor_parallel,
            seed=self.stream_seed,
            logprobs_mode="processed_logprobs",
            # Eager and with a cache of known size, the CPU backend needs no warm-up pass.
            enforce_eager=on_cpu or self.deterministic,
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30) if on_cpu else None,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enable_prefix_caching=not self.deterministic,
            # On CPU a request with a seed whose prompt is cut by a step's token budget ends the engine: vLLM winds its
            # generator back, which the CPU's cannot do. Uncut, prompts beyond the budget wait for the next step.
            enable_chunked_prefill=False if on_cpu else None,
            async_scheduling=False,  # a token sampled ahead would carry the version of the weights that came after it
            weight_transfer_config=WeightTransferConfig(backend=weight_transfer.BACKEND),
            worker_extension_cls=f"{weight_transfer.__name__}.{weight_transfer.RegisterInWorker.__name__}",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    # Generating

    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        from vllm.inputs import tokens_input

        for request in requests:
            ticket = str(next(self._tickets))
            self._engine.add_request(ticket, tokens_input(list(request.token_ids)), self._sampling(request))
            self._in_work[ticket] = request

    def _sampling(self, request: GenerationRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0 if request.greedy else self.config.temperature,
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
        return [self._generation(self._in_work.pop(output.request_id), output.outputs[0]) for output in finished]

    def _generation(self, request: GenerationRequest, output: Any) -> Generation:
        token_ids = tuple(output.token_ids)
        if tuple(output.logprobs.token_ids) != token_ids:
            raise ValueError(f"vLLM gave log-probs of other tokens than it sampled for request {request.key}")
        versions = tuple(int(span.version) for span in output.weight_versions for _ in range(span.start, span.end))
        if len(versions) != len(token_ids):
            raise ValueError(f"vLLM gave {len(versions)} weight versions for {len(token_ids)} tokens of {request.key}")
        reason = FINISH_REASONS[output.finish_reason]
        return Generation(*request.key, token_ids, tuple(output.logprobs.logprobs), versions, reason)

    def _running(self) -> int:
        return min(len(self._in_work), self._engine.vllm_config.scheduler_config.max_num_seqs)

    def _drop(self) -> None:
        self._engine.abort_request(list(self._in_work))
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
        self._engine.collective_rpc("start_weight_update")

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        self._engine.collective_rpc("update_weights", kwargs={"update_info": {"weights": weights}})

    def _take_sent(self, info: dict[str, Any]) -> None:
        self._sent = True
        self._engine.collective_rpc("update_weights", kwargs={"update_info": {"sent": info}})

    def _received(self) -> list[str]:
        return self._engine.collective_rpc("received_checksum") if self._sent else []

    def _end_load(self) -> None:
        self._engine.collective_rpc("finish_weight_update")
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(self.weight_version))

    # Life

    def _close(self) -> None:
        self._engine.engine_core.shutdown()
        del self._engine


def _refuse_what_vllm_gets_wrong(directory: Path, *, on_cpu: bool) -> None:
    """Refuse a model whose log-probs would not be the trainer's, as ``check`` does where its directory is at hand."""
    refused = sampling_refusal(json.loads((directory / "config.json").read_text("utf-8")), on_cpu=on_cpu)
    if refused is not None:
        raise RequestError(f"{directory}: {refused}")


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
        # vLLM compiles two helpers of its sampler on first use: 2 to 30 s for kernels that the CPU gains nothing by.
        torch.compiler.set_stance("force_eager")
