"""Chat templates in the shapes that real ones have, each with what it must come to by hand.

They differ in what they write after an answer, before it, and in place of it. The end tokens are written here from what each
family's model samples last, not found by the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.chat import ChatFormat

BOS, EOS = "<bos>", "<eos>"
THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Shape:
    """A template, and the tokens it needs."""

    template: str
    end: str
    """The token that ends an answer."""
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    eos: str = EOS
    system: bool = True
    """Whether it takes a message of the system."""
    variables: Mapping[str, Any] = field(default_factory=dict)


def _turns(turn: str, ask: str, *, first: str = "") -> str:
    """A template that writes ``turn`` for each message, and ``ask`` where an answer is to follow."""
    return f"{first}{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% endif %}}"


IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SHAPES: dict[str, Shape] = {
    "a newline after the end": Shape(
        _turns(f"{IM_START}{{{{ m.role }}}}\n{{{{ m.content }}}}{IM_END}\n", f"{IM_START}assistant\n"),
        IM_END,
        (IM_START, IM_END),
    ),
    "an empty think block before a finished answer": Shape(
        _turns(
            f"{IM_START}{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}"
            "{% set thought = m.reasoning_content or '' %}"
            "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
            "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
            "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}"
            f"{{% else %}}{{{{ m.content }}}}{{% endif %}}{IM_END}\n",
            f"{IM_START}assistant\n{{% if enable_thinking is defined and not enable_thinking %}}<think>\n\n</think>\n\n"
            "{% endif %}",
            first="{% if tools %}tools: {{ tools[0].function.name }}\n{% endif %}",
        ),
        IM_END,
        (IM_START, IM_END),
        THINK,
    ),
    "a think block that the prompt opens and a finished answer closes": Shape(
        _turns(
            f"{IM_START}{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}<think>\n\n</think>\n\n"
            f"{{{{ m.content | trim }}}}{{% else %}}{{{{ m.content | trim }}}}{{% endif %}}{IM_END}\n",
            f"{IM_START}assistant\n<think>\n",
        ),
        IM_END,
        (IM_START, IM_END),
        THINK,
    ),
    "a think block that the prompt opens and a finished answer has not": Shape(
        _turns(
            "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}<|Assistant|>"
            "{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% else %}{{ m.content }}{% endif %}",
            "<|Assistant|><think>\n",
            first="{{ bos_token }}",
        ),
        "<|end_of_sentence|>",
        ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
        THINK,
        eos="<|end_of_sentence|>",
    ),
    "blanks stripped and the day written": Shape(
        _turns(
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            first="{{ bos_token }}{% if not date_string is defined %}"
            "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }}\n",
        ),
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|eot_id|>",
        variables={"date_string": "26 Jul 2024"},
    ),
    "no generation prompt": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'system' %}[SYS]{{ m.content }}[/SYS]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        EOS,
        ("[INST]", "[/INST]", "[SYS]", "[/SYS]"),
    ),
    "an end that is not the tokenizer's, and no system": Shape(
        _turns(
            "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
            "<start_of_turn>model\n",
            first="{{ bos_token }}",
        ),
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        added=("\n", "\n\n"),
        system=False,
    ),
    "no end at all": Shape(
        _turns(
            "{% if m.role == 'assistant' %}<|assistant|>\n<think></think>\n{{ m.content | trim }}"
            "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}",
            "<|assistant|>",
            first="[gMASK]<sop>",
        ),
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        THINK,
        eos="<|endoftext|>",
    ),
    "an end of the turn and then an end of the conversation": Shape(
        _turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "two tokens that end together, and the next header": Shape(
        _turns(
            "<|START|>{{ m.role }}<|BODY|>{{ m.content }}<|END_RESPONSE|><|END_OF_TURN|>",
            "<|START|>assistant<|BODY|>",
        )
        + "{% if not add_generation_prompt %}<|START|>assistant<|THINKING|>{% endif %}",
        "<|END_OF_TURN|>",
        ("<|START|>", "<|BODY|>", "<|END_RESPONSE|>", "<|END_OF_TURN|>", "<|THINKING|>"),
        eos="<|END_OF_TURN|>",
    ),
    "the next header after everything": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}<|assistant|>\n",
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "a closing of many tokens, none of them the tokenizer's end": Shape(
        _turns(
            "<|open|>{{ m.role }}<|sep|>{{ m.content }}<|close|>{{ m.role }}<|sep|><|end_of_msg|>",
            "<|open|>assistant<|sep|>",
        ),
        "<|end_of_msg|>",
        ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
    ),
    "a channel before a finished answer, and another end in the middle": Shape(
        _turns(
            "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}",
            "<|start|>assistant",
        ),
        "<|return|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"),
        eos="<|return|>",
    ),
}


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Letters and a few merges, among them two that join newlines, with every token that the template names."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "a"), (".", "Ċ")]
    words = {**letters, **{one + other: len(letters) + number for number, (one, other) in enumerate(merges)}}
    tokenizer = Tokenizer(models.BPE(words, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys((BOS, shape.eos, EOS, *shape.special))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in shape.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=shape.eos, chat_template=shape.template
    )


CHATS = {name: ChatFormat(make_tokenizer(shape), shape.variables) for name, shape in SHAPES.items()}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def sampled(name, prompt, answer):
    """What a policy would sample: without the code under test, by transformers' template and tokenizer and the end by hand."""
    shape, tokenizer = SHAPES[name], CHATS[name].tokenizer
    before = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **shape.variables
    )
    if before[-2:] == tokenizer.convert_tokens_to_ids(["<think>", "Ċ"]):
        answer = answer.removeprefix("<think>\n")  # which the prompt has written already
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return before, ids, tokenizer.convert_tokens_to_ids(shape.end)
