"""What a config names becomes examples: counted, split by whole prompts, mixed; nothing of a row is lost before a batch."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encode import EQUAL, TOO_LONG
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.data.load import TIE, load_demonstrations, load_pairs, load_prompts
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text(json.dumps({"text": "what is it? it is this, it is that"}) + "\n")
    return make_tokenizer(str(path), 300)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


class Files:
    """Writes files of pairs and reads them as a config says."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def write(self, *rows: dict[str, Any], name: str = "pairs.jsonl") -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def read(self, seed: int = 0, **keys: Any) -> Any:
        data = DataConfig.model_validate({"cache": str(self.folder / "cache"), "evaluation_fraction": 0.0, **keys})
        return load_pairs(data, self.tokenizer, seed)

    def text(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids))).removesuffix("<eos>")


@pytest.fixture
def files(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    return Files(tmp_path, tokenizer)


def pair(number: int, prompt: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt or f"what is {number}?",
        "chosen": f" this {number}",
        "rejected": f" that {number}",
        **more,
    }


# ----------------------------------------------------------------------------------------------------------- what is kept


def test_drops_are_counted_and_reported(files: Files, log: pytest.LogCaptureFixture) -> None:
    long, equal = pair(1, chosen=" this" * 99), pair(2, chosen=" same", rejected=" same")
    path = files.write(pair(0), long, equal, long, pair(3))
    split = files.read(path=path, max_tokens=60)
    assert [files.text(one.chosen) for one in split.train] == ["what is 0? this 0", "what is 3? this 3"]
    assert split.dropped == {TOO_LONG: 2, EQUAL: 1}
    assert f"{path}: of 5 training rows dropped: 2 too long, 1 with two equal sides" in log.text


def test_a_prompt_that_is_cut_is_reported(files: Files, log: pytest.LogCaptureFixture) -> None:
    path = files.write(pair(0, "what is it? " * 40), pair(1))
    split = files.read(path=path, max_tokens=60, too_long="cut_prompt")
    assert len(split.train[0].chosen) <= 60
    assert files.text(split.train[0].chosen).endswith("what is it?  this 0")
    assert "1 prompts were cut at their beginning (data.too_long)" in log.text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            pair(1, chosen=" a" * 99),
            r"pairs\.jsonl: no row is left to train on \(2 too long\); raise data\.max_tokens, or give other rows$",
        ),
        (
            pair(1, chosen=" a", rejected=" a"),
            r"no row is left to train on \(2 with two equal sides\); give other rows$",
        ),
    ],
)
def test_all_pairs_dropped_is_an_error(files: Files, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        files.read(path=files.write(row, row), max_tokens=50)


def test_prompts_that_are_all_too_long_name_the_key_that_bounds_prompts(files: Files) -> None:
    data = DataConfig.model_validate({"path": files.write({"prompt": "what is it? " * 40}), "max_prompt_tokens": 9,
                                      "evaluation_fraction": 0.0})  # fmt: skip
    with pytest.raises(DataError, match=r"\(1 too long\); raise data\.max_prompt_tokens, or give other rows$"):
        load_prompts(data, files.tokenizer, 0)


def test_a_grade_that_never_differs_is_an_error(files: Files) -> None:
    same = files.write(pair(1, grade=2), pair(2, grade=2))
    with pytest.raises(
        DataError, match=r"pairs\.jsonl: 'grade' is 2 in all 2 pairs, from which no grade can be learned"
    ):
        files.read(path=same)
    assert len(files.read(path=files.write(pair(1, grade=2), pair(2, grade=1))).train) == 2
    assert len(files.read(path=files.write(pair(1, margin=2), pair(2, margin=2))).train) == 2, (
        "a margin may be constant"
    )


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_side_that_never_differs_is_reported(files: Files, side: str, log: pytest.LogCaptureFixture) -> None:
    files.read(path=files.write(*(pair(number, **{side: " it"}) for number in range(3))))
    assert f"the {side} answer is the same in all 3 pairs" in log.text


# ------------------------------------------------------------------------------------------------------------ what is held out


def test_whole_prompts_are_held_out(files: Files) -> None:
    rows = [pair(number, f"what is {number % 10}?") for number in range(40)]
    split = files.read(path=files.write(*rows), evaluation_fraction=0.2)
    halves = [{files.text(one.chosen[: one.prompt_length]) for one in half} for half in (split.train, split.held_out)]
    assert len(split.held_out) == 8
    assert [len(half) for half in halves] == [8, 2]
    assert not halves[0] & halves[1]
    again = files.read(path=files.write(*rows), evaluation_fraction=0.2)
    assert [list(one.chosen) for one in again.held_out] == [list(one.chosen) for one in split.held_out]
    other = files.read(seed=1, path=files.write(*rows), evaluation_fraction=0.2)
    assert [list(one.chosen) for one in other.held_out] != [list(one.chosen) for one in split.held_out]


def test_a_share_without_a_whole_prompt_is_an_error(files: Files) -> None:
    path = files.write(*(pair(number, "what is it?") for number in range(20)))
    with pytest.raises(
        DataError, match=r"a share of 0\.5 \(data\.evaluation_fraction\) of 20 rows holds out no whole prompt"
    ):
        files.read(path=path, evaluation_fraction=0.5)
    assert files.read(path=path).held_out == []


@pytest.mark.parametrize("prompt", ["what is 1?", "What  is 1"])
def test_a_held_out_file_that_shares_prompts_is_refused_unless_a_key_says_what_to_do(
    files: Files, log: pytest.LogCaptureFixture, prompt: str
) -> None:
    train = files.write(pair(0), pair(1))
    held_out = files.write(pair(5, prompt), pair(2), name="held.jsonl")
    keys = {"path": train, "evaluation_path": held_out, "evaluation_fraction": None}
    found = f"{held_out}: 1 of 2 held-out rows have a prompt that is trained on"
    with pytest.raises(DataError, match=r"leave them out with data\.shared_prompts=drop, or keep them") as refused:
        files.read(**keys)
    assert str(refused.value).startswith(found)
    for choice, kept in (("keep", 2), ("drop", 1)):
        log.clear()
        split = files.read(**keys, shared_prompts=choice)
        assert [len(split.train), len(split.held_out)] == [2, kept]
        assert found in log.text
    only = files.write(pair(5, prompt), name="only.jsonl")
    with pytest.raises(DataError, match="every held-out row has a prompt that is trained on"):
        files.read(**{**keys, "evaluation_path": only}, shared_prompts="drop")


def test_what_is_left_of_a_held_out_file_may_be_nothing(files: Files) -> None:
    held_out = files.write(pair(5), pair(2), name="held.jsonl")
    with pytest.raises(DataError, match=r"held\.jsonl: no row is left to evaluate on \(2 too long\)"):
        files.read(
            path=files.write(pair(0, "a", chosen="b", rejected="c")), evaluation_path=held_out, evaluation_fraction=None,
            max_tokens=4,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- mixtures


def test_sources_are_mixed_by_their_weights_and_give_their_names(files: Files) -> None:
    one = files.write(*(pair(number) for number in range(10)), pair(10, source="own"), name="one.jsonl")
    row = {"q": "what?", "better": " this", "worse": " that"}
    two = files.write(*({**row, "q": f"what? {number}"} for number in range(20, 30)), pair(0) | row, name="two.jsonl")
    keys = {"prompt_key": "q", "chosen_key": "better", "rejected_key": "worse"}
    sources = {"one": {"path": one}, "two": {"path": two, "weight": 0.5, **keys}}
    split = files.read(sources=sources)
    assert split.parts == [(11, 11), (11, 6)]
    assert Counter(example.source for example in split.train) == {"one": 10, "own": 1, "two": 11}
    assert files.text(split.train[11].chosen) == "what? 20 this"
    held = files.read(sources=sources, evaluation_fraction=0.5)
    assert len(held.held_out) == 11
    assert [part.size for part in held.parts] == [
        sum(example.source in names for example in held.train) for names in (("one", "own"), ("two",))
    ]


def test_a_prompt_in_two_files_is_in_one_half(files: Files) -> None:
    paths = [files.write(*(pair(number + 100 * add, f"what is {number}?") for number in range(10)), name=name)
             for add, name in enumerate(("a.jsonl", "b.jsonl"))]  # fmt: skip
    split = files.read(sources={"a": {"path": paths[0]}, "b": {"path": paths[1]}}, evaluation_fraction=0.3)
    halves = [{files.text(one.chosen[: one.prompt_length]) for one in half} for half in (split.train, split.held_out)]
    assert len(split.held_out) == 6
    assert not halves[0] & halves[1]


def test_a_number_that_only_one_file_has_is_an_error(files: Files) -> None:
    sources = {"a": {"path": files.write(pair(1, margin=1.0), name="a.jsonl")}, "b": {"path": files.write(pair(2))}}
    with pytest.raises(
        DataError, match=r"a\.jsonl, .*pairs\.jsonl: 1 of 2 pairs have a 'margin': fill it in all files or none"
    ):
        files.read(sources=sources)


def test_prompts_and_demonstrations_are_mixed_too(files: Files) -> None:
    rows = [{"prompt": f"what is {number}?", "answer": " it"} for number in range(8)]
    sources = {name: {"path": files.write(*half, name=f"{name}.jsonl"), "weight": weight}
               for name, half, weight in (("a", rows[:5], 1.0), ("b", rows[5:], 2.0))}  # fmt: skip
    data = DataConfig.model_validate({"sources": sources, "evaluation_fraction": 0.25})
    prompts = load_prompts(data, files.tokenizer, 0)
    assert sorted(prompt.prompt_id for prompt in (*prompts.train, *prompts.held_out)) == list(range(8))
    assert [prompt.prompt_id for prompt in (*prompts.train, *prompts.held_out)] == list(range(8)), "numbered through"
    assert {prompt.source for prompt in prompts.train} == {"a", "b"}
    sizes = [part.size for part in prompts.parts]
    assert sum(sizes) == 6
    assert [part.per_epoch for part in prompts.parts] == [sizes[0], 2 * sizes[1]]
    assert load_demonstrations(data, files.tokenizer, 0).parts == prompts.parts


# ---------------------------------------------------------------------------------------------------------------- data sets


def encoded(split: Any) -> list[list[tuple[list[int], list[int]]]]:
    return [[(list(one.chosen), list(one.rejected)) for one in half] for half in (split.train, split.held_out)]


def test_a_folder_gives_the_order_and_the_hold_out_of_a_file(files: Files) -> None:
    rows = [pair(number, f"what is {number % 13}?") for number in range(50)]
    from_file = files.read(path=files.write(*rows), evaluation_fraction=0.2)
    datasets.Dataset.from_list(rows).save_to_disk(files.folder / "saved", num_shards=3)
    (files.folder / "parts").mkdir()
    for number in range(2):
        files.write(*rows[25 * number : 25 * (number + 1)], name=f"parts/part-{number}.jsonl")
    for folder in ("saved", "parts"):
        from_folder = files.read(path=str(files.folder / folder), evaluation_fraction=0.2)
        assert encoded(from_folder) == encoded(from_file)


def test_a_split_is_trained_on_and_another_held_out(files: Files) -> None:
    folder = files.folder / "set"
    folder.mkdir()
    files.write(*(pair(number) for number in range(4)), name="set/train.jsonl")
    files.write(pair(7), pair(8), name="set/test.jsonl")
    split = files.read(path=str(folder), evaluation_split="test", evaluation_fraction=None)
    texts = [[files.text(one.chosen) for one in half] for half in (split.train, split.held_out)]
    assert texts == [[f"what is {number}? this {number}" for number in numbers] for numbers in (range(4), (7, 8))]
    sliced = files.read(path=str(folder), split="train[1:3]", evaluation_path=str(folder), evaluation_split="test",
                        evaluation_fraction=None)  # fmt: skip
    assert encoded(sliced) == [encoded(split)[0][1:3], encoded(split)[1]]
    sources = {"a": {"path": str(folder), "split": "test"}, "b": {"path": str(folder)}}
    assert [part.size for part in files.read(sources=sources, split="train").parts] == [2, 4]
    files.write(pair(9), name="set/test.jsonl")
    changed = files.read(path=str(folder), evaluation_split="test", evaluation_fraction=None)
    assert [files.text(one.chosen) for one in changed.held_out] == ["what is 9? this 9"], (
        "kept pairs are of the content"
    )


def test_a_tokenizer_is_made_from_all_splits(files: Files) -> None:
    (files.folder / "set").mkdir()
    files.write({"text": "zebra " * 9}, name="set/train.jsonl")
    files.write({"text": "quagga " * 9}, name="set/test.jsonl")
    tokenizer = make_tokenizer(files.folder / "set", 300)
    assert len(tokenizer.tokenize("zebra quagga")) == 2


# --------------------------------------------------------------------------------------------------------------- real rows


def test_real_dialogues(tokenizer: Any, tmp_path: Path) -> None:
    """Counts only: these texts are offensive and are never shown."""
    path = SHARED / "hh_harmless_pairs.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    few = tmp_path / "few.jsonl.gz"
    with gzip.open(path, "rb") as file, gzip.open(few, "wb") as short:
        short.writelines(line for line, _ in zip(file, range(200), strict=False))
    data = DataConfig(path=str(few), evaluation_fraction=0.1, max_tokens=1200, cache=str(tmp_path / "cache"))
    fresh, kept = (load_pairs(data, tokenizer, 0) for _ in range(2))
    assert len(fresh.train) + len(fresh.held_out) + fresh.dropped.total() == 200
    assert 0 < fresh.dropped[TOO_LONG] < 100
    for one, other in zip((*fresh.train, *fresh.held_out), (*kept.train, *kept.held_out), strict=True):
        assert list(one.chosen) == list(other.chosen) and list(one.rejected) == list(other.rejected)
        assert list(one.chosen[: one.prompt_length]) == list(one.rejected[: one.prompt_length])
        assert len(one.chosen) <= 1200 and 0 < one.prompt_length < len(one.chosen)


# ---------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_of_pairs_holds_chosen_and_rejected_in_turn() -> None:
    examples = [PairExample([1, 2, 3], [1, 4], margin=0.5, grade=0.0), PairExample([5], [6, 7], margin=2.0, grade=-1.0)]
    batch = make_pair_batch(examples)
    assert batch["token_ids"].tolist() == [1, 2, 3, 1, 4, 5, 6, 7]
    assert batch.lengths.tolist() == [3, 2, 1, 2]
    assert batch["margin"].tolist() == [0.5, 0.5, 2.0, 2.0]
    assert batch["grade"].tolist() == [0.0, 0.0, -1.0, -1.0]
    assert batch["margin"].dtype == batch["grade"].dtype == torch.float32


@pytest.mark.parametrize("numbers", [{}, {"margin": 1.0}, {"grade": 0.0}])
def test_a_batch_has_the_columns_that_its_pairs_have(numbers: dict[str, float]) -> None:
    batch = make_pair_batch([PairExample([1], [2], **numbers)] * 2)
    assert set(batch.columns) == {"token_ids", *numbers}


def test_ties_are_dropped_and_counted_unless_the_loss_reads_grades(files: Files, log: pytest.LogCaptureFixture) -> None:
    arena = {"prompt": "what?", "response_a": " this", "response_b": " that"}
    path = files.write(*[arena | {"winner": winner, "prompt": f"what {winner}?"} for winner in ("b", "tie", "a")])
    graded = files.read(path=path)
    assert [pair.grade for pair in graded.train] == [1, 0, 1] and not graded.dropped
    data = DataConfig.model_validate({"path": path, "evaluation_fraction": 0.0, "cache": None})
    split = load_pairs(data, files.tokenizer, 0, graded=False)
    assert [files.text(pair.chosen) for pair in split.train] == ["what b? that", "what a? this"]
    assert [pair.grade for pair in split.train] == [None, None]
    assert (
        split.dropped == {TIE: 1}
        and "1 that are ties, which have no better side (a reward model with loss.name=ordinal learns from them)"
        in log.text
    )
    same = load_pairs(data.model_copy(update={"path": files.write(pair(1, grade=2), pair(2, grade=2))}), files.tokenizer, 0,
                      graded=False)  # fmt: skip
    assert len(same.train) == 2, "a grade that never differs does not matter to a loss that reads none"
