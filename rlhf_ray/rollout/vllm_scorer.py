"""A reward model in vLLM's pooling runner.

Invariants: scores are raw, one per sequence, in the order of the sequences, and read at the last token; vLLM gets token ids
and never text; a model that vLLM would score differently from this project's own forward pass is refused, with the way out.

vLLM changes the threads and process groups of its process: run one scorer per process, and no trainer beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config.files.architectures import HEAD, OTHERWISE, not_one_score, vllm_refusal
from rlhf_ray.config.files.encoders import encoder_type, not_in_vllm
from rlhf_ray.config.files.models import is_adapter
from rlhf_ray.config.files.positions import longest_sequence
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.models.devices import CPU
from rlhf_ray.rollout.vllm_engine import prepare_process, vllm_dtype

CPU_CACHE_BYTES = 2**30
"""Size of the key-value cache for what is scored at once. Memory is used only as it fills."""
GPU_SHARE = 0.9


class VllmScorer:
    """A reward model in vLLM."""

    def __init__(
        self, model: ModelConfig, *, max_item_tokens: int, device: torch.device = CPU, share: float = 1.0
    ) -> None:
        """``max_item_tokens`` bounds a sequence, as the model's positions do; ``share`` is that of a GPU which it may use."""
        assert model.path is not None, "the config takes scorer vllm only with a path"
        self.config = servable_config(model, max_item_tokens)
        self.vocabulary: int = self.config.get_text_config().vocab_size
        self.encoder = encoder_type(self.config.to_dict()) is not None
        self.max_item_tokens = min(
            max_item_tokens, longest_sequence(self.config.get_text_config().to_dict()) or max_item_tokens
        )
        on_cpu = device.type == "cpu"
        prepare_process(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM probes deprecated names of torch while it is imported
            from vllm import LLM
            from vllm.config import PoolerConfig

            self._llm = _started(
                LLM,
                model.path,
                runner="pooling",
                revision=model.revision,
                load_format="safetensors",  # else vLLM opens a pickle where there is nothing else
                trust_remote_code=model.trust_remote_code,
                dtype=vllm_dtype(model.dtype),
                max_model_len=self.max_item_tokens,
                enforce_eager=on_cpu,
                kv_cache_memory_bytes=CPU_CACHE_BYTES if on_cpu else None,
                gpu_memory_utilization=GPU_SHARE * share,
                enable_prefix_caching=False,  # a score must not depend on what was scored before
                use_tqdm_on_load=False,
                pooler_config=PoolerConfig(use_activation=False),
            )

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The raw score of each sequence of token ids."""
        prompts: Any = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        return [output.outputs.probs[0] for output in self._llm.classify(prompts, use_tqdm=False)]


def _started(start: Callable[..., Any], path: str, **options: Any) -> Any:
    """Start vLLM on a model; what it says against one that it does not know becomes an error in one line."""
    try:
        return start(path, **options)
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else repr(error))
        raise RequestError(
            f"vLLM's pooling runner does not run {path} ({said[:200]}): choose another model, {OTHERWISE}"
        ) from error


def servable_config(model: ModelConfig, max_item_tokens: int = 0) -> Any:
    """The model's configuration, where vLLM's pooling runner gives it the scores that this project does."""
    from transformers import AutoConfig

    assert model.path is not None, "the config holds scorer vllm only with a path"
    if is_adapter(Path(model.path)):
        raise RequestError(
            f"{model.path} is an adapter, and vLLM scores merged models: rlhf-ray export it, {OTHERWISE}"
        )
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    architecture = (config.architectures or ["no architecture"])[0]
    if not architecture.endswith(HEAD) or config.num_labels != 1:
        described = (
            architecture if not architecture.endswith(HEAD) else f"{architecture} with {config.num_labels} outputs"
        )
        raise RequestError(f"{model.path}: {not_one_score(described)}")
    kind = encoder_type(config.to_dict())
    if kind is None:
        _refuse_other_heads(model, config)
    elif (problem := not_in_vllm(model.path, kind)) is not None:
        raise RequestError(problem)
    refused = vllm_refusal(config.to_dict(), max_item_tokens)
    if refused is not None:
        raise RequestError(f"{model.path}: {refused}")
    return config


def _refuse_other_heads(model: ModelConfig, config: Any) -> None:
    """Refuse a causal model whose head is not the plain ``score.weight`` that vLLM looks for."""
    from rlhf_ray.models.head_layouts import find_head, require_head
    from rlhf_ray.models.weights.checkpoint import HEAD_NAME, Checkpoint

    assert model.path is not None
    checkpoint = Checkpoint.open(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    require_head(checkpoint, HEAD_NAME, trust_remote_code=model.trust_remote_code)
    found = find_head(checkpoint, HEAD_NAME)
    assert found is not None, "require_head refuses a checkpoint without a head"
    if found.layers != (HEAD_NAME,):
        raise RequestError(
            f"the head of {model.path} is {found.kind}, and vLLM reads one called {HEAD_NAME} with one layer: rlhf-ray export "
            f"writes a linear head so, {OTHERWISE}"
        )
    bias = config.to_dict().get("score_bias")
    if f"{HEAD_NAME}.bias" in checkpoint.names or (bias and bias is not True):
        shown = f"score_bias {bias:g}" if bias else f"{HEAD_NAME}.bias"
        raise RequestError(
            f"the head of {model.path} has a bias ({shown}), which vLLM would leave out: set scorer to packed"
        )
