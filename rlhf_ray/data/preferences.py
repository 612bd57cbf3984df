"""Preference pairs: two answers to one prompt, of which people preferred the first.

Always true: prompt and answer joined are the text of the row, whether the row named its prompt or the prompt was found as
what both sides begin with; both sides of a pair have the same kind (text or messages).
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data.conversations import Content, read_content
from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.data.split import Split, split_rows

ASSISTANT_TURN = "\n\nAssistant:"
"""Where an answer begins in dialogues in the format of Anthropic's hh-rlhf."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; ``margin`` says by how much the chosen one is better, where people said so."""

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None = None
    source: str = ""


def load_preferences(config: DataConfig, seed: int = 0) -> Split[PreferencePair]:
    """The pairs that a config names, and those held out."""
    if config.world is not None:
        from rlhf_ray.data.world import World

        world = World(config.world.seed)
        train = world.preferences(config.world.pairs)[: config.max_rows]
        return Split(train, world.preferences(config.world.evaluation_pairs, "evaluation", flipped=0.0))
    return split_rows(config, lambda path: read_preferences(path, config), lambda pair: pair.prompt, seed)


def read_preferences(path: str, config: DataConfig) -> list[PreferencePair]:
    """The pairs of one file."""
    rows = read_rows(path, (config.chosen_key, config.rejected_key), config.max_rows)
    return [read_pair(row, config.prompt_key, config.chosen_key, config.rejected_key) for row in rows]


def read_pair(row: Row, prompt_key: str, chosen_key: str, rejected_key: str) -> PreferencePair:
    """The pair in one row, in any of the four layouts: with or without a prompt, text or messages."""
    chosen, rejected = read_content(row, chosen_key), read_content(row, rejected_key)
    if prompt_key in row:
        prompt = read_content(row, prompt_key)
    else:
        prompt, chosen, rejected = _split(row, chosen, rejected)
    if len({isinstance(content, str) for content in (prompt, chosen, rejected)}) != 1:
        raise row.error("prompt and answers are partly text and partly messages: write all of them in one way")
    source = row["source"] if "source" in row else ""
    return PreferencePair(prompt, chosen, rejected, _margin(row), str(source))


def _margin(row: Row) -> float | None:
    if "margin" not in row:
        return None
    try:
        return float(row["margin"])
    except (TypeError, ValueError):
        raise row.error(f"'margin' is {row['margin']!r}: a number was expected") from None


def _split(row: Row, chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_texts(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise row.error("one side is text and the other messages: write both in one way")
    shared = len(commonprefix([chosen, rejected]))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and both answers of two dialogues that begin alike.

    The prompt ends with the last turn mark that both share, or, in texts without turns, before the last space that both
    share, so that no word is cut.
    """
    shared = commonprefix([chosen, rejected])
    turn = shared.rfind(ASSISTANT_TURN)
    if turn >= 0:
        end = turn + len(ASSISTANT_TURN)
    else:
        end = max(shared.rfind(" "), shared.rfind("\n"), 0)
    return chosen[:end], chosen[end:], rejected[end:]
