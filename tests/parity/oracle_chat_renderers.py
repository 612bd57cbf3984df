"""What prime-rl's renderers make of conversations: the ids that a policy is given, and the token that ends its answer.

Run in the environment of the independent implementations: python oracle_chat_renderers.py FOLDER. The folder holds
``cases.json`` and a tokenizer for each renderer.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import renderers
from pydantic import TypeAdapter
from renderers.configs import RendererConfig
from transformers import PreTrainedTokenizerFast


def main(directory: Path) -> None:
    """Write ``values.npz`` and ``versions.json`` into ``directory``."""
    cases = json.loads((directory / "cases.json").read_text())
    values: dict[str, list[int]] = {}
    for name in cases["renderers"]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / name)
        renderer = renderers.create_renderer(tokenizer, TypeAdapter(RendererConfig).validate_python({"name": name}))
        stops = list(renderer.get_stop_token_ids())
        for case, conversation in cases["conversations"].items():
            messages, tools = conversation["messages"], conversation.get("tools")
            values[f"{name}/{case}/prompt"] = renderer.render_ids(messages, tools=tools, add_generation_prompt=True)
            whole = renderer.render([*messages, {"role": "assistant", "content": "It is five."}], tools=tools)
            sampled = [token for token, own in zip(whole.token_ids, whole.sampled_mask, strict=True) if own]
            values[f"{name}/{case}/end"] = sampled[-1:] if sampled[-1] in stops else stops[:1]
    np.savez(directory / "values.npz", **{name: np.array(ids) for name, ids in values.items()})
    versions = {package: version(package) for package in ("renderers", "transformers", "tokenizers")}
    (directory / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
