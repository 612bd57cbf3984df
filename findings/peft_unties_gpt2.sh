#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.19.0, torch 2.13.0): ensure_weight_tying ties by the names of layers, and GPT-2's is not known.
#
# LoraConfig(ensure_weight_tying=True) promises that the embedding and the head of a model stay one matrix when modules_to_save
# trains them. It acts on the names embed_tokens and lm_head alone. GPT-2 shares the two as well, but its embedding is called
# wte: a copy of it is trained, and the head keeps the old matrix. The only sign is a warning, which says that no tied module
# was named, although one was. Naming the head beside it ("lm_head") ties the two.
#
# Seen on 2026-11-30 (the last lines of the output):
#   llama, embed_tokens: one matrix: True, then True; no warning
#   gpt2, wte: one matrix: True, then False; no tied modules are added in either `modules_to_save` or `target_modules`
#   gpt2, wte and lm_head: one matrix: True, then True; no warning
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# The build for CPUs, which is small, where the index has it.
install torch==2.13.0+cpu 2> "$folder/log" || install torch==2.13.0
install peft==0.21.2 transformers==5.19.0
cat > "$folder/try.py" <<'PY'
import sys
import warnings

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

llama = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=True
)
gpt2 = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)


def trained(module: torch.nn.Module) -> torch.Tensor:
    """The matrix that ``module`` computes with: the copy that peft trains, or its own."""
    return module.modules_to_save["default"].weight if hasattr(module, "modules_to_save") else module.weight


def tied(base: torch.nn.Module, target: str, save: list[str]) -> str:
    """Whether embedding and head are one matrix, before peft and after it, and what peft warned of."""
    before = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    config = peft.LoraConfig(target_modules=[target], modules_to_save=list(save), ensure_weight_tying=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(base, config).get_base_model()
    after = trained(model.get_input_embeddings()) is trained(model.get_output_embeddings())
    warned = [str(one.message).rpartition(", but ")[2] for one in caught if "ensure_weight_tying" in str(one.message)]
    return f"one matrix: {before}, then {after}; {'; '.join(warned) or 'no warning'}"


cases = {
    "llama, embed_tokens": tied(LlamaForCausalLM(llama), "q_proj", ["embed_tokens"]),
    "gpt2, wte": tied(GPT2LMHeadModel(gpt2), "c_attn", ["wte"]),
    "gpt2, wte and lm_head": tied(GPT2LMHeadModel(gpt2), "c_attn", ["wte", "lm_head"]),
}
expected = {
    "llama, embed_tokens": "one matrix: True, then True; no warning",
    "gpt2, wte": "one matrix: True, then False; no tied modules are added in either `modules_to_save` or `target_modules`",
    "gpt2, wte and lm_head": "one matrix: True, then True; no warning",
}
print("peft", peft.__version__)
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py"
