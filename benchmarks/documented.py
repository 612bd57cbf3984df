"""The measured numbers in README and docs, and the figures of ``results/reference.json`` that they state.

    python -m benchmarks.documented [--write]      list the numbers that differ; --write corrects them in the pages

A comment in the Markdown source, which no reader sees, says which figure a number is:

- In a table, the first cell of a row names the figures that its other cells show, in their order:
  ``| PPO, win rate (KL) <!-- figures: demo.gold_win_rate, demo.kl --> | 0.902 (2.58) | 0.893 (3.18) |``.
  A column with the heading ``seed 1`` shows the numbers of seed 1; of columns ``seed 4``, ``seed 5`` the first shows those of
  the first seed that was run.
- In a sentence, the comment follows its number: ``about 4<!-- figure: demo.minutes --> minutes``. ``NAME@1`` is the number
  of seed 1; ``NAME@min`` and ``NAME@max`` are the least and the largest of all seeds.
- ``<!-- not measured -->`` in a table or paragraph, or right above it, says that its numbers are settings or bounds; as the
  first line of a page it counts for the whole page.

Invariants: a number is stated with as many decimals as the page shows, a share as it is or in percent. A decimal or a
percentage in a table, and a number with a unit or with three decimals in a sentence, is either named or marked as not
measured. Code, links and released sections of the changelog are not read.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import REFERENCE, Figure, read
from rlhf_ray.storage import write_file

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.,@])(\d+(?:,\d{3})*(?:\.\d+)?)( ?%)?(?![\w@])")
FIGURES = re.compile(r"<!-- figures?: ([^>]*?) -->")
NOT_MEASURED = "<!-- not measured -->"
HIDDEN = re.compile(r"^ *```.*?^ *```$|^ {4}.*?$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", re.MULTILINE | re.DOTALL)
"""Text that states no numbers: code, targets of links, comments."""
LOOKS_MEASURED = {
    "table": re.compile(r"(?<![\w.,-])\d+(?:\.\d+(?![\w.])| ?%)"),
    "sentence": re.compile(
        r"(?<![\w.,-])\d+(?:\.\d{3,}\b|(?:\.\d+)? ?(?:%|(?:s|ms|GB|GiB|MB|nats|times|seconds|minutes|hours)\b))"
    ),
}


@dataclass(frozen=True)
class Claim:
    """A number at ``start``..``end`` of a page's text, and the figure it states; ``selector`` chooses among its seeds."""

    line: int
    start: int
    end: int
    stated: str
    figure: str
    selector: str

    def expected(self, figures: Mapping[str, Figure]) -> str:
        """The number as the page should state it; a ``KeyError`` where there is no such figure."""
        value = _select(figures[self.figure], self.selector)
        number = self.stated.rstrip(" %")
        decimals = len(number.partition(".")[2])
        percent = self.stated[len(number) :]
        return f"{100 * value if percent else value:,.{decimals}f}{percent}"


@dataclass(frozen=True)
class Block:
    """A paragraph or table: its text, where it begins in the page, and whether its numbers are measured."""

    text: str
    start: int
    line: int
    measured: bool

    @property
    def is_table(self) -> bool:
        """Whether it is a table with a row of headings."""
        return re.search(r"^\|[-| :]+\|$", self.text, re.MULTILINE) is not None


def pages() -> list[Path]:
    """The pages whose numbers are checked."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("deploy/*/*.md")]


def page_text(page: Path) -> str:
    """The part of a page that is checked: all of it, but of the changelog only its newest section."""
    text = page.read_text()
    return "".join(re.split(r"^(?=## )", text, flags=re.MULTILINE)[:2]) if page.name == "CHANGELOG.md" else text


def claims(text: str) -> list[Claim]:
    """Every number that is marked as a figure, in the order of the text; a ``ValueError`` names a mark without one."""
    return [claim for block in _blocks(text) for claim in (_in_table if block.is_table else _in_sentences)(block)]


def unmarked(text: str) -> list[tuple[int, str]]:
    """Line and text of every number that looks measured and is not marked, neither as a figure nor as not measured."""
    claimed = {claim.start for claim in claims(text)}
    looks_measured = []
    for block in _blocks(text):
        pattern = LOOKS_MEASURED["table" if block.is_table else "sentence"]
        for match in pattern.finditer(_visible(block.text)) if block.measured else ():
            if block.start + match.start() not in claimed:
                looks_measured.append((block.line + block.text[: match.start()].count("\n"), match[0]))
    return looks_measured


def corrected(text: str, figures: Mapping[str, Figure]) -> str:
    """The text with every number as its figure says."""
    for claim in reversed(claims(text)):
        text = text[: claim.start] + claim.expected(figures) + text[claim.end :]
    return text


def _select(figure: Figure, selector: str) -> float:
    if not selector:
        return figure.value
    return (
        {"min": min, "max": max}[selector](figure.seeds) if selector in ("min", "max") else figure.seeds[int(selector)]
    )


def _visible(text: str) -> str:
    """The text with everything that states no numbers replaced by spaces of the same length."""
    return HIDDEN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _blocks(text: str) -> Iterator[Block]:
    page_excused, excused = text.startswith(NOT_MEASURED), False
    for match in re.finditer(r"(?:^(?!\s*$).*\n?)+", text, re.MULTILINE):
        block, line = match[0], text[: match.start()].count("\n") + 1
        if block.strip() == NOT_MEASURED:
            excused = True
            continue
        yield Block(block, match.start(), line, not (page_excused or excused or NOT_MEASURED in block))
        excused = False


def _in_sentences(block: Block) -> Iterator[Claim]:
    for mark in FIGURES.finditer(block.text):
        numbers = [number for number in NUMBER.finditer(block.text) if number.end() == mark.start()]
        if not numbers:
            raise ValueError(f"no number stands before {mark[0]}")
        yield _claim(block, numbers[0].span(), mark[1], "")


def _in_table(block: Block) -> Iterator[Claim]:
    headings: list[str] = []
    for row in re.finditer(r"^\|(.*)\|$", block.text, re.MULTILINE):
        cells = [(cell[0], row.start() + 1 + cell.start()) for cell in re.finditer(r"[^|]+", row[1])]
        headings = headings or [cell.strip() for cell, _ in cells]
        mark = FIGURES.search(cells[0][0])
        if mark is None:
            continue
        names = [name.strip() for name in mark[1].split(",")]
        numbers = [
            ((offset + number.start(), offset + number.end()), re.fullmatch(r"seed (\d+)", heading))
            for (cell, offset), heading in list(zip(cells, headings, strict=True))[1:]
            for number in NUMBER.finditer(_visible(cell))
        ]
        if not numbers or len(numbers) % len(names):
            raise ValueError(f"the row of {mark[0]} shows {len(numbers)} numbers of {len(names)} figures")
        for place, (span, seed) in enumerate(numbers):
            yield _claim(
                block, span, names[place % len(names)], str(int(seed[1]) - _first_seed(headings)) if seed else ""
            )


def _first_seed(headings: Sequence[str]) -> int:
    """The seed that stands first in the figures of a table: where several columns are of seeds, that of the first column."""
    seeds = [int(match[1]) for heading in headings if (match := re.fullmatch(r"seed (\d+)", heading))]
    return seeds[0] if len(seeds) > 1 else 0


def _claim(block: Block, span: tuple[int, int], name: str, selector: str) -> Claim:
    figure, _, chosen = name.partition("@")
    start, end = span
    line = block.line + block.text[:start].count("\n")
    return Claim(line, block.start + start, block.start + end, block.text[start:end], figure, chosen or selector)


def main(arguments: Sequence[str] | None = None) -> int:
    """List or correct the numbers that differ; returns 1 where one differs and was not corrected."""
    parser = argparse.ArgumentParser(prog="benchmarks.documented", description="compare the docs with the figures")
    parser.add_argument("--write", action="store_true", help="correct the numbers in the pages")
    options = parser.parse_args(arguments)
    figures = read(REFERENCE)
    differ = False
    for page in pages():
        checked = page_text(page)
        for claim in claims(checked):
            if claim.stated != claim.expected(figures):
                differ = True
                print(f"{page.relative_to(ROOT)}: {claim.figure} is {claim.expected(figures)}, not {claim.stated}")
        if options.write:
            write_file(page, page.read_text().replace(checked, corrected(checked, figures)))
    return 1 if differ and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
