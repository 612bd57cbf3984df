"""Hold the ids of conversations against what a policy samples, over the chat templates that published packages hold.

    python -m tests.parity.chat_templates [--packages FOLDER] [--templates FOLDER] [NAME ...]

For every template, with and without a message of the system, with an earlier answer and with thinking, finished and cut:
the ids that reward training makes of a pair, those that the service makes of the same item, and those that PPO asks its
reward model about, must be the ids that the policy was given, by plain ``apply_chat_template`` with the generation prompt;
the ids of its answer, by the plain tokenizer; and the token that ends the answer, by a table that is written here by hand. A
template that refuses a conversation in its own words is not counted for it; one that the product refuses is counted by name.

Tokenizers are made here, with the special tokens that a template names; only the equality of ids counts.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import Drops, encode_pairs, encode_prompts
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.reward_reading import assumed_reading
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.encoding import encode_request
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt

from .chat_template_sources import fetch

ROOT = Path(__file__).parents[2]
MANY, SHOWN = 1_000_000, 3
ENDS: Mapping[str, tuple[str, ...]] = {
    "<|im_end|>": ("Bielik", "SmolLM3", "Kimi-K2", "LFM2", "MiMo", "Nemotron-3", "nemotron_3", "Qwen", "qwen", "StepFun",
                   "lfm2", "lfm-2", "MiniCPM", "minicpm", "chatml", "unsloth__gemma2_chatml", "phi-4", "yi-chat"),
    "<|end|>": ("Apriel", "Phi-3.5", "Solar-Open", "phi3", "phi-3"),
    "<|assistant_end|>": ("Apertus",),
    "<seed:eos>": ("ByteDance-Seed",),
    "<|END_OF_TURN_TOKEN|>": ("Cohere", "cohere"),
    "<|endoftext|>": ("GLM", "glm4moe", "chatglm2", "falcon"),
    "</s>": ("Mistral", "Ministral", "Devstral", "rwkv", "alpaca", "unsloth__llama", "mistral", "unsloth__unsloth", "vicuna",
             "zephyr", "baichuan", "basic", "blip2", "ocr", "kimi_audio", "Hermes", "llava"),
    "[e~[": ("MiniMax-M2", "MiniMax-M3"),
    "<sep>": ("Reka",),
    "<｜end▁of▁sentence｜>": ("deepseek", "Spark2.5"),
    "<end_of_turn>": ("gemma-2", "gemma3", "gemma-3", "unsloth__gemma"),
    "<turn|>": ("gemma-4", "gemma4", "diffusion_gemma"),
    "<|end_of_text|>": ("granite",),
    "<|eot_id|>": ("functionary", "firefunction", "Llama-3", "llama3", "unsloth__llama-3"),
    "<|eot|>": ("muse-glimmer", "muse_glimmer"),
    "<|return|>": ("gpt-oss", "gptoss"),
    "<｜hy_eos:opensource｜>": ("Hy3",),
    "<|eos|>": ("hunyuan",),
    "<end_of_utterance>": ("idefics3", "smolvlm"),
    "<|end_of_turn|>": ("starling",),
    "<_end>": ("teleflm",),
    "<|end_of_msg|>": ("Kimi-K3",),
    "<SPECIAL_12>": ("Nemotron-Nano-v2",),
    "<|role_end|>": ("ling-3.0",),
    "</assistant>": ("Laguna",),
    "<|message_sep|>": ("GigaChat",),
    "<end_of_sentence>": ("MiniMax-M1",),
}  # fmt: skip
"""The token that a policy of each family samples last, by parts of the names of templates; the longest that fits counts."""
OTHER_EOS: Mapping[str, str] = {
    "Kimi-K3": "<|im_end|>", "Nemotron-Nano-v2": "<|endoftext|>", "ling-3.0": "<|endoftext|>", "Laguna": "<|endoftext|>",
    "GigaChat": "</s>", "MiniMax-M1": "[e~[", "gemma2_chatml": "<end_of_turn>", "diffusion_gemma": "<end_of_turn>",
    "Spark2.5": "<|endoftext|>", "phi3": "<|endoftext|>", "Phi-3.5": "<|endoftext|>", "Apriel-1.5": "</s>",
    "gemma-2": "<eos>", "gemma3": "<eos>",
}  # fmt: skip
"""The tokenizer's own end of sequence, where it is another one."""
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<｜[^｜\s]{1,40}｜>|<\|?(?:start_of_turn|end_of_turn|turn|channel)\|?>|<turn\|>|<channel\|>"
    r"|\[/?[A-Z_]{3,20}\]|\[gMASK\]|<sop>|</?s>|<sep>|\[e~\[|\]~!b\[|\]~b\]|<(?:end|beginning)_of_sentence>|</?(?:assistant|user)>"
    r"|<seed:[a-z_:]+>|<SPECIAL_\d+>|<_[a-z]+>|<end_of_utterance>"
)
ADDED = re.compile(r"</?(?:think|tool_call|tool_response|mm:think|think:opensource)>")
OPENED = re.compile(r"(<think>|<mm:think>|<\|START_THINKING\|>)\n?\Z")
QUESTIONS = {
    "one turn": [{"role": "user", "content": "What is 2 + 3?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}],
    "three turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello there."},
        {"role": "user", "content": "What is 2 + 3?\n"},
    ],
}
ANSWERS = (
    "It is five.", "5", " It is five. \n", "\nIt is five.", "\n\nFive:\n\n- 5", "<think>\nAdd them.\n</think>\n\nIt is five.",
    "<think>Add them.</think>It is five.", "Add them.\n</think>\n\nIt is five.", "Is 2 < 3? Yes, [2] <b>is</b>.",
)  # fmt: skip
WORSE = "No."


def make_tokenizer(
    name: str, template: str, *, start: str = "<bos>", besides: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 1500 merges that splits as Qwen's does, with the tokens that the template names, and others."""
    end = end_of(name)
    eos = next((token for part, token in OTHER_EOS.items() if part in name), end)
    special = list(dict.fromkeys([start, eos, end, *SPECIAL.findall(template), *besides]))
    words = Tokenizer.from_str(_merges())
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token in dict.fromkeys(ADDED.findall(template)) if token not in special]
    words.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    words.post_processor = processors.TemplateProcessing(
        single="START $A", special_tokens=[{"id": "START", "ids": [words.token_to_id(start)], "tokens": [start]}]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=start, eos_token=eos, chat_template=template)


_trained: list[str] = []


def _merges() -> str:
    """The tokenizer without special tokens, trained once on this project's documents."""
    if not _trained:
        words = Tokenizer(models.BPE())
        pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        words.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=1756, initial_alphabet=alphabet, show_progress=False)
        words.train([str(path) for path in sorted((ROOT / "docs").glob("*.md"))], trainer)
        _trained.append(words.to_str())
    return _trained[0]


def end_of(name: str) -> str:
    """The end token of a template, by the table."""
    fits = [(len(part), token) for token, parts in ENDS.items() for part in parts if part in name]
    if not fits:
        raise SystemExit(f"{name}: no end token is known for it: add its family to ENDS")
    return max(fits)[1]


def sampled(tokenizer: Any, prompt: Sequence[Mapping[str, str]], answer: str, end: int) -> tuple[list[int], list[int]]:
    """What a policy is given, and what it samples; none of it by the product."""
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    opened = OPENED.search(text)
    if opened and answer.startswith(opened[1]):  # which the prompt has written already
        answer = answer.removeprefix(opened[0])
        answer = answer.removeprefix(opened[1]) if opened[0].endswith("\n") else answer
    return before, [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]


class Asked:
    """A reward model that remembers what it is asked about."""

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        raise AssertionError("it is asked nothing here")


def differences(name: str, template: str) -> Iterator[str]:
    """Every conversation for which one of the paths has other ids than the policy, or that the product refuses."""
    tokenizer = make_tokenizer(name, template)
    end = tokenizer.convert_tokens_to_ids(end_of(name))
    chat = ChatFormat(tokenizer)
    for kind, prompt in QUESTIONS.items():
        for answer in ANSWERS:
            try:
                before, ids = sampled(tokenizer, prompt, answer, end)
                tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
            except Exception:  # the template refuses it in its own words
                yield "refused by the template"
                continue
            try:
                found = product(chat, prompt, answer, before, ids)
            except RlhfRayError as error:
                yield f"refused by the product: {error}"
                continue
            wrong = [path for path, (theirs, ours) in found.items() if theirs != ours]
            yield f"{kind}, {answer!r}: {', '.join(wrong)}" if wrong else "equal"


def product(
    chat: ChatFormat, prompt: Sequence[Mapping[str, str]], answer: str, before: list[int], ids: list[int]
) -> dict[str, tuple[list[int], list[int]]]:
    """By path, what must be equal: the ids that a policy has or samples, and those that the product makes."""
    said = {"role": "assistant", "content": answer}
    (pair,) = encode_pairs(chat, [PreferencePair(prompt, [said], [{**said, "content": WORSE}])], MANY, Drops())
    assert pair is not None, "answers that differ are a pair"
    (asked,) = encode_prompts(chat, [Prompt(0, "", messages=prompt)], MANY, Drops())
    turns = tuple(dict(turn) for turn in (*prompt, said))
    whole = [*before, *ids]

    reading = assumed_reading("the model", chat.tokenizer, None, form="conversation")

    def served(request: ScoreRequest) -> list[int]:
        return list(encode_request(chat, request, reading=reading, max_tokens=MANY, vocabulary=MANY).token_ids)

    def rewarded(token_ids: list[int], *, finished: bool) -> list[int]:
        sample = TextSample(0, 0, "", answer, None, finished, tuple(token_ids), messages=turns)
        source = ModelSource(Asked(), policy=chat, stop_tokens=[ids[-1], chat.tokenizer.eos_token_id])
        return list(source.request(sample).token_ids or ())

    found = {
        "training": (whole, pair.chosen),
        "the prompt's length": (before, pair.chosen[: pair.prompt_length]),
        "PPO's prompt": (before, asked),
        "PPO's reward": (whole, rewarded(whole, finished=True)),
        "PPO's reward, cut": (whole[:-1], rewarded(whole[:-1], finished=False)),
        "PPO's reward, another stop": (whole, rewarded([*whole[:-1], chat.tokenizer.eos_token_id], finished=True)),
        "messages": (whole, served(ScoreRequest(messages=turns))),
        "messages, cut": (whole[:-1], served(ScoreRequest(messages=turns, finished=False))),
    }
    if len(prompt) == 1:
        found["prompt and response"] = whole, served(ScoreRequest(prompt=prompt[0]["content"], response=answer))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each template that is not equal throughout, and the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.chat_templates", description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, help="where packages are downloaded to, and looked for")
    parser.add_argument("--templates", type=Path, help="a folder of further templates, FAMILY__NAME.jinja")
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of names; all templates by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        templates = fetch(options.packages or Path(folder))
    if options.templates:
        templates |= {path.stem: path.read_text("utf-8") for path in sorted(options.templates.glob("*.jinja"))}
    counts: Counter[str] = Counter()
    for name, template in templates.items():
        if options.names and not any(part in name for part in options.names):
            continue
        outcomes = Counter(differences(name, template))
        judged = {line: count for line, count in outcomes.items() if line != "refused by the template"}
        refused = [line for line in judged if line.startswith("refused by the product")]
        wrong = [line for line in judged if line != "equal" and line not in refused]
        verdict = "UNEQUAL" if wrong else "refused" if refused else "equal" if judged else "renders nothing"
        counts[verdict] += 1
        if verdict != "equal":
            lines = [f"    {line} ({count})" for line, count in judged.items()]
            print(f"{verdict}: {name}", *lines[:SHOWN], *["    ..."] * (len(lines) > SHOWN), sep="\n")
    print(f"{sum(counts.values())} templates: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    return int(bool(counts["UNEQUAL"]) or counts["refused"] > 5)


if __name__ == "__main__":
    sys.exit(main())
