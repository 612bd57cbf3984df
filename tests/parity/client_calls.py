"""Runs in the clients' environment: asks a service through one client, as its project does, and prints the scores."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from itertools import cycle
from types import SimpleNamespace

PROMPT = "why? "
"""Of the clients that ask for the scores of answers."""


def with_token(address: str, token: str) -> str:
    """The address for clients that take nothing else."""
    return address.replace("http://", f"http://x:{token}@")


def openrlhf(address: str, token: str, texts: list[str]) -> list[float]:
    """OpenRLHF's executor, which posts one sample a request; its file is loaded without the rest of the package."""
    sys.modules["openrlhf.utils.logging_utils"] = SimpleNamespace(init_logger=logging.getLogger)
    package = importlib.util.find_spec("openrlhf")
    spec = importlib.util.spec_from_file_location("agent", f"{package.submodule_search_locations[0]}/utils/agent.py")
    agent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    executor = agent.SingleTurnAgentExecutor.__new__(agent.SingleTurnAgentExecutor)
    executor.reward_endpoints = [f"{with_token(address, token)}/get_reward"]
    executor._reward_endpoint_cycle = cycle(executor.reward_endpoints)

    async def run() -> list[float]:
        calls = (executor._fetch_rewards_via_http([text], [text], [None]) for text in texts)
        return [answer[0]["rewards"][0] for answer in await asyncio.gather(*calls)]

    return asyncio.run(run())


def openai(address: str, token: str, texts: list[str]) -> list[float]:
    """openai's client, which asks for base64 by itself."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key=token)
    answer = client.embeddings.create(model="reward", input=texts, encoding_format="float")
    return [row.embedding[0] for row in answer.data]


def openai_base64(address: str, token: str, texts: list[str]) -> list[float]:
    """The same in base64, which it asks for by itself where nothing is said."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key=token)
    assert client.models.list().data[0].id
    return [row.embedding[0] for row in client.embeddings.create(model="reward", input=texts).data]


def tei(address: str, token: str, texts: list[str]) -> list[float]:
    """A client of text-embeddings-inference, at its predictions; it asks ``/info`` first."""
    from tei_client import HttpClient

    client = HttpClient(address, headers={"Authorization": f"Bearer {token}"})
    return [result.scores[0].score for result in client.classify(texts, raw_scores=True)]


def haystack(address: str, token: str, texts: list[str]) -> list[float]:
    """Haystack's ranker on text-embeddings-inference, at its reranking."""
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    ranker = HuggingFaceTEIRanker(url=address, raw_scores=True, token=Secret.from_token(token))
    ranked = ranker.run(query=PROMPT, documents=[Document(content=text) for text in texts])["documents"]
    scores = {document.content: document.score for document in ranked}
    assert [document.score for document in ranked] == sorted(scores.values(), reverse=True)
    return [scores[text] for text in texts]


def curl(address: str, token: str, texts: list[str]) -> list[float]:
    """curl, as anybody types it."""
    body = json.dumps({"query": texts})
    command = ["curl", "-sSf", "-H", f"Authorization: Bearer {token}", "-d", body, f"{address}/get_reward"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["rewards"]


def verl_vllm(address: str, token: str, texts: list[str]) -> list[float]:
    """verl's reward loop as it asks vLLM: at ``/classify``."""
    return _verl("vllm", address, token, texts)


def verl_sglang(address: str, token: str, texts: list[str]) -> list[float]:
    """verl's reward loop as it asks SGLang: at ``/v1/embeddings``."""
    return _verl("sglang", address, token, texts)


def _verl(engine: str, address: str, token: str, texts: list[str]) -> list[float]:
    """verl's worker over answers to one prompt: it decodes them, and puts them into the reward model's template."""
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.protocol import DataProto

    reward = {
        "reward_model": {"enable": True, "model_path": asked["model"], "rollout": {"name": engine}},
        "custom_reward_function": {"path": None},
        "reward_manager": {"source": "register", "name": "naive"},
    }
    policy = {"model": {"tokenizer_path": asked["model"], "path": asked["model"]}}
    config = OmegaConf.create({"actor_rollout_ref": policy, "reward": reward})
    worker = RewardLoopWorker(config, with_token(address, token).removeprefix("http://"))
    encode = worker.input_tokenizer
    answers = [torch.tensor(encode(text, add_special_tokens=False)["input_ids"]) for text in texts]
    longest = max(map(len, answers))
    padded = [torch.nn.functional.pad(answer, (0, longest - len(answer))) for answer in answers]
    held = [torch.arange(longest) < len(answer) for answer in answers]
    prompts = np.empty(len(texts), dtype=object)
    prompts[:] = [[{"role": "user", "content": PROMPT}] for _ in texts]
    batch = DataProto.from_dict(
        {"responses": torch.stack(padded), "attention_mask": torch.stack(held).long()}, {"raw_prompt": prompts}
    )
    return [row["reward_score"] for row in worker.loop.run_until_complete(worker.compute_score_batch(batch))]


def trl(address: str, token: str, texts: list[str]) -> list[float]:
    """TRL's GRPO trainer with this project's adapter among its reward functions, which it awaits in a loop of its own."""
    sys.path.append(asked["project"])
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from rlhf_ray.rewards.adapters import remote_reward

    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    policy = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        options = GRPOConfig(directory, use_cpu=True, report_to=[], per_device_train_batch_size=2, num_generations=2)
        trainer = GRPOTrainer(
            policy, remote_reward(address, token=token), options, Dataset.from_dict({"prompt": [PROMPT]}),
            processing_class=tokenizer,
        )  # fmt: skip
        rows = [{"prompt": PROMPT} for _ in texts]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        return trainer._calculate_rewards(rows, [PROMPT] * len(texts), texts, ids)[:, 0].tolist()


if __name__ == "__main__":
    os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
    asked = json.load(sys.stdin)
    print(json.dumps(globals()[asked["client"]](asked["address"], asked["token"], asked["texts"])))
