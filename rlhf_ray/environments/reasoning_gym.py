"""Tasks of the package reasoning-gym as rows on disk, and the package's own verifiers as a reward function.

    python -m rlhf_ray.environments.reasoning_gym FAMILY FOLDER [--train N] [--test N] [--demonstrations N]
        [--careless N] [--second-turns END] [KEY=VALUE ...]

Invariants:

- No question is in two of the files, not even written otherwise: neighbouring seeds of reasoning-gym share nearly all items.
- A row holds its whole entry, so that a verifier made anywhere judges it: no process makes a task a second time.
- A family is refused whose verifier gives full marks to wrong answers, whose tasks change with the process, or which has no
  answer of its own.
- A score is a number from 0 to 1 of the stripped answer, or an error; an answer that was cut off has 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_ray.environments.protocol import Answer, Task, Turn
from rlhf_ray.environments.settings import parse_settings
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.rows.same_prompt import hash_prompt
from rlhf_ray.storage.atomic import write_file

_FULL_MARKS = "its verifier gives full marks to wrong answers"
_CHANGES = "its tasks change from one process to the next"
_NO_ANSWER = "its entries hold no answer"
_TUPLES = "its entries do not survive being written as JSON"
REFUSED = {
    **dict.fromkeys(
        ("game_of_life_halting", "puzzle24", "complex_arithmetic", "coin_flip", "game_of_life"), _FULL_MARKS
    ),
    **dict.fromkeys(
        (
            "isomorphic_strings",
            "ransom_note",
            "knight_swap",
            "word_ladder",
            "polynomial_multiplication",
            "codeio",
            "acre",
        ),
        _CHANGES,
    ),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_ANSWER),
    **dict.fromkeys(("arc_agi", "rearc"), _TUPLES),
}
"""Families of reasoning-gym 0.1.25 that are not fit for training, and why."""
TRIES = 50
"""How many items are looked at for each one that is wanted, before a family counts as too small."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_answer(text: str) -> str:
    """What a verifier is shown of an answer: the inside of its last ``<answer>`` tags, or all of it, without blanks around."""
    inside = ANSWER.findall(text)
    return str(inside[-1] if inside else text).strip()


def make_rows(
    family: str, count: int, *, seed: int = 0, exclude: Sequence[str] = (), **settings: Any
) -> list[dict[str, Any]]:
    """``count`` rows of different questions, none of them in ``exclude``, in the order in which the family gives them.

    Raises :class:`RequestError` for a family that is refused, unknown, or has too few questions.
    """
    tasks = _data_set(family, seed=seed, size=TRIES * count, **settings)
    seen, rows = {hash_prompt(question, nearly=True) for question in exclude}, list[dict[str, Any]]()
    for number in range(TRIES * count):
        entry = tasks[number]
        question = hash_prompt(entry["question"], nearly=True)
        if question not in seen:
            seen.add(question)
            rows.append(
                {
                    "prompt": f"{entry['question']}\n",
                    "answer": entry["answer"],
                    "label": {"family": family, "entry": entry},
                }
            )
        if len(rows) == count:
            return rows
    raise RequestError(
        f"{family}: {len(rows)} different questions in {TRIES * count} items, {count} were asked for: ask for fewer, or make "
        "its settings larger"
    )


def score(responses: Sequence[str], labels: Sequence[Any], finished: Sequence[bool]) -> list[float]:
    """The verifier's score of each answer; a reward function (``reward.function``)."""
    return [
        verify(label, response) if ended else 0.0
        for response, label, ended in zip(responses, labels, finished, strict=True)
    ]


def verify(label: Any, response: str) -> float:
    """The verifier's score of one answer to the task ``label``, as :func:`make_rows` wrote it."""
    if not isinstance(label, dict) or not {"family", "entry"} <= label.keys():
        raise RequestError(
            "the prompt's label is no task of reasoning-gym: make rows with python -m rlhf_ray.environments.reasoning_gym, and "
            "set data.label_key to label"
        )
    answer, entry, verifier = extract_answer(response), label["entry"], _verifier(str(label["family"]))
    try:
        value = float(verifier.score_answer(answer, entry))
    except Exception:  # of an answer that it cannot read a verifier may raise what it likes
        verifier.score_answer(entry["answer"], entry)  # raises again where the task is at fault, and not the answer
        return 0.0
    if not math.isfinite(value):
        raise RequestError(f"the verifier of {label['family']} gave {value} for {answer[:40]!r}")
    return min(1.0, max(0.0, value))


RIGHT, WRONG = "Right. Now backward:\n", "Wrong. Again:\n"
"""What :class:`Twice` says after a first answer."""


class Twice:
    """Two turns over one task: what the second one asks for follows from the first answer, and full marks need both.

    A right answer gets 0.5, and is then asked for backward, letter by letter, for another 0.5. A wrong one is asked for again,
    for 0.25. What the verifier gives less than full marks is wrong.
    """

    def reset(self, task: Task) -> None:
        """Begin with a task whose label :func:`make_rows` wrote."""
        self.label = task.label
        self.first_right: bool | None = None

    def step(self, answer: Answer) -> Turn:
        """Judge an answer."""
        text, ended = answer.text, answer.finished
        if self.first_right is None:
            self.first_right = ended and verify(self.label, text) == 1.0
            return Turn(0.5 * self.first_right, done=False, observation=RIGHT if self.first_right else WRONG)
        asked = extract_answer(text)[::-1] if self.first_right else text
        share = 0.5 if self.first_right else 0.25
        return Turn(share * (ended and verify(self.label, asked) == 1.0))


def second_turns(rows: Sequence[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """Demonstrations of the second turn of :class:`Twice`, after a right first answer and after one that is written backward.

    ``end`` is the text of the token that ends an answer.
    """
    demonstrations = []
    for row in rows:
        right = str(row["answer"])
        wrong = right[::-1]
        demonstrations.append({**row, "prompt": f"{row['prompt']}{right}{end}{RIGHT}", "answer": wrong})
        if verify(row["label"], wrong) < 1.0:
            demonstrations.append({**row, "prompt": f"{row['prompt']}{wrong}{end}{WRONG}", "answer": right})
    return demonstrations


def with_careless(rows: Sequence[dict[str, Any]], copies: int) -> list[dict[str, Any]]:
    """The rows, and of each one ``copies`` more whose answer is written backward: demonstrations of mixed quality.

    Every question is answered both ways, so that a policy learns how to do both and cannot learn which questions are
    answered carelessly: it is right in about one answer of ``copies + 1``, and a reward tells it which way is right.
    """
    return [*rows, *({**row, "answer": str(row["answer"])[::-1]} for row in rows for _ in range(copies))]


@cache
def _verifier(family: str) -> Any:
    return _data_set(family, seed=0, size=1)


def _data_set(family: str, **settings: Any) -> Any:
    if family in REFUSED:
        raise RequestError(f"reasoning-gym's {family} is not fit for training: {REFUSED[family]}; take another family")
    try:
        package = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise RequestError(f"reasoning-gym is missing ({error}): pip install 'rlhf-ray[gym]'") from error
    try:
        return package.create_dataset(family, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise RequestError(f"reasoning-gym cannot make {family} with {settings}: {error}") from error


def write_files(
    family: str, folder: Path, sizes: dict[str, int], end: str | None = None, *, careless: int = 0, **settings: Any
) -> None:
    """Write a file of rows for each name of ``sizes``; no question is in two of them.

    With ``end``, the text of the token that ends an answer, the demonstrations hold second turns too. Each demonstration has
    ``careless`` copies with the answer written backward.
    """
    rows = make_rows(family, sum(sizes.values()), **settings)
    start = 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        part = rows[start : start + size]
        if name == "demonstrations":
            part = with_careless([*part, *([] if end is None else second_turns(part, end))], careless)
        write_file(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        start += size


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files of one family."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.environments.reasoning_gym", description=__doc__)
    parser.add_argument("family")
    parser.add_argument("folder", type=Path)
    for name, count in (("demonstrations", 1000), ("train", 1000), ("test", 200)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"rows of {name}.jsonl (default {count})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--second-turns", metavar="END", help="demonstrate the second turn of Twice too; END ends an answer"
    )
    parser.add_argument(
        "--careless", type=int, default=0, help="copies of each demonstration with the answer backward (default 0)"
    )
    parser.add_argument("settings", nargs="*", help="settings of the family, such as max_word_len=4")
    given = parser.parse_intermixed_args(arguments)
    sizes = {name: getattr(given, name) for name in ("demonstrations", "train", "test")}
    try:
        write_files(
            given.family,
            given.folder,
            sizes,
            given.second_turns,
            careless=given.careless,
            seed=given.seed,
            **parse_settings(given.settings),
        )
    except RlhfRayError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
