"""``rlhf-ray evaluate POLICY --prompts FILE``: sample one policy, or two at the same prompts, and say which is better.

Invariants: both policies answer the same prompts with the same settings and the same seed, and are judged by the same reward.
The answers of each are kept beside the figures, so that the same command goes on where it was interrupted, and costs no
sampling once they are there. What is wrong with the request is told before an engine starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.actors.place import Place
from rlhf_ray.config.jobs.generate import GenerateConfig
from rlhf_ray.console import get_logger, say, table
from rlhf_ray.environment import expand_home
from rlhf_ray.errors import RequestError
from rlhf_ray.launch.sampling.answers import AnsweredPrompt, read_answers
from rlhf_ray.launch.sampling.generate import sample_answers
from rlhf_ray.launch.sampling.policy_figures import Figure, PolicyReport, report_on
from rlhf_ray.monitoring.report import summary as pages
from rlhf_ray.monitoring.report.page import RunReport, render_report
from rlhf_ray.storage import OutputFile

OF_A_CHOICE = ("select", "top", "cut_answers", "condition")
"""Keys of ``generate`` that make rows of answers."""
KEPT = ("model", "against")
"""What the files of answers are called by, in the order of the policies."""
SHOWN = 10
"""Prompts whose answers stand on the page."""
UNDECIDED = 0.5


@dataclass(frozen=True)
class PolicyEvaluation:
    """Which policies answer what, and what is counted of it."""

    configs: Sequence[GenerateConfig]
    """One policy, or the one that is judged and the one that it is judged against."""
    pass_at: Sequence[int] = ()

    def check(self) -> None:
        """Refuse what cannot be counted, with a :class:`RequestError`."""
        models = [(_whole(config.model.path), config.model.revision) for config in self.configs]
        if any(config.reward is None for config in self.configs):
            raise RequestError(
                "answers are compared by their rewards: give --reward a reward model, the URL of a service, or a function"
            )
        if len(models) > len({*models}):
            raise RequestError(
                f"--against names {self.configs[1].model.path}, which is the model itself: name another policy"
            )
        for key in OF_A_CHOICE:
            if getattr(self.configs[0], key) != GenerateConfig.model_fields[key].default:
                raise RequestError(f"{key} is about rows to train on, and evaluate writes none: remove it")
        for k in self.pass_at:
            if k < 1:
                raise RequestError(f"--pass-at {k} is undefined: write whole numbers from 1 on")
            if k > self.configs[0].samples:
                raise RequestError(
                    f"--pass-at {k} is undefined for {self.configs[0].samples} answers to a prompt: raise --samples, "
                    "or lower it"
                )


def evaluate_policies(
    evaluation: PolicyEvaluation, output: OutputFile, *, places: Sequence[Place | None] = (None, None)
) -> PolicyReport:
    """Sample what is missing, and write the figures to ``output`` and a page beside it.

    ``places`` are where the engines of each policy run, by default on Ray. Raises :class:`ResumableStop` where answers are
    missing that the same call would sample.
    """
    evaluation.check()
    page = check_output(output)
    names = [config.model.path for config in evaluation.configs]
    kept = answer_files(output.path)[: len(names)]
    for config, place, path in zip(evaluation.configs, places, kept, strict=False):
        get_logger().info("%s answers the prompts", config.model.path)
        sample_answers(config, path, place=place)
    answers = [read_answers(path)[1] for path in kept]
    report = report_on(names, answers, evaluation.pass_at, evaluation.configs[0].run.seed)
    output.write(json.dumps(as_json(report, kept), indent=1, ensure_ascii=False) + "\n")
    page.write(as_page(report, answers))
    return report


def check_output(output: OutputFile) -> OutputFile:
    """Refuse an output that cannot be written, or whose page beside it cannot; returns the page."""
    path = output.path.with_suffix(".html")
    if path == output.path:
        raise RequestError(
            f"--output {path} is where the page goes: name a .json file for the figures, and the page lies beside it"
        )
    page = OutputFile(path, "the page beside --output", output.overwrite, reads=output.reads)
    output.check()
    page.check()
    return page


def _whole(path: str) -> str:
    """A directory by its only name; the id of a hub as it is."""
    place = expand_home(path)
    return str(place.resolve()) if place.exists() else path


def answer_files(output: Path) -> list[Path]:
    """Where the answers of both policies are kept whose figures are at ``output``."""
    return [output.with_name(f"{output.stem}.{name}.answers.jsonl") for name in KEPT]


def as_json(report: PolicyReport, kept: Sequence[Path]) -> dict[str, Any]:
    """The report as plain JSON: figures by name, and intervals of 95 % under the same names."""
    return {
        "prompts": report.prompts,
        "left_out": report.left_out,
        "samples": report.samples,
        "policies": {
            key: {"path": name, "answers": str(path), **_plain(figures)}
            for key, name, path, figures in zip(KEPT, report.names, kept, report.figures, strict=False)
        },
        "comparison": _plain(report.comparison) if report.comparison else None,
        "sources": _plain(report.sources) if report.sources else None,
    }


def _plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        "figures": {name: figure.value for name, figure in figures.items()},
        "intervals": {name: list(figure.interval) for name, figure in figures.items() if figure.interval is not None},
    }


def print_report(report: PolicyReport, output: Path) -> None:
    """Show the figures of each policy and of both together, and a sentence that says what they mean."""
    say(table("answers", *_figures_table(report)))
    if report.comparison:
        say(table(f"{report.names[0]} against {report.names[1]}", *_comparison_table(report)))
    if report.sources:
        rows = [(source or "(no source)", shown(figure)) for source, figure in report.sources.items()]
        say(table("win rate by source", ("source", "win rate"), rows))
    say(verdict(report))
    if report.neither:
        get_logger().warning(
            "%d rewards are neither 0 nor 1: pass@k counts an answer as right from 1 on, so give a function that says right or "
            "wrong", report.neither,
        )  # fmt: skip
    say(f"{output} holds the figures, {output.with_suffix('.html')} is a page with answers side by side")


def verdict(report: PolicyReport) -> str:
    """What was found, in a sentence or two."""
    over = f"over {report.prompts} prompts, {report.samples} answers each"
    if report.left_out:
        over += f" ({report.left_out} prompts left out, which lack a reward)"
    if not report.comparison:
        return f"{report.names[0]}: mean reward {shown(report.figures[0]['reward'])}, {over}."
    rate, controlled = report.comparison["win_rate"], report.comparison["length_controlled_win_rate"]
    assert rate.interval is not None
    low, high = rate.interval
    shows = "is better" if low > UNDECIDED else "is worse" if high < UNDECIDED else "is not shown to differ"
    return (
        f"{report.names[0]} {shows}: it wins {shown(rate)} of the time against {report.names[1]}, ties half "
        f"({report.comparison['ties'].value:.1%} are ties), and {shown(controlled)} at equal lengths, {over}. In "
        "brackets: intervals of 95 %."
    )


def shown(figure: Figure) -> str:
    """A figure with its interval."""
    if figure.interval is None:
        return f"{figure.value:.4g}"
    low, high = figure.interval
    return f"{figure.value:.3f} ({low:.3f} to {high:.3f})"


def _figures_table(report: PolicyReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = [*report.figures[0]]
    rows = [(name.replace("_", " "), *(shown(figures[name]) for figures in report.figures)) for name in names]
    return ("figure", *report.names), rows


def _comparison_table(report: PolicyReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("figure", "value"), [(name.replace("_", " "), shown(figure)) for name, figure in report.comparison.items()]


def as_page(report: PolicyReport, answers: Sequence[Sequence[AnsweredPrompt]]) -> str:
    """The report as a page, with the first prompts and the first answers to them side by side."""
    figures_headers, figures_rows = _figures_table(report)
    _, rows = _comparison_table(report)
    headline = report.comparison or report.figures[0]
    facts = {
        "prompts": str(report.prompts),
        "left out": str(report.left_out),
        "answers to a prompt": str(report.samples),
    }
    by_id = [{one.prompt_id: one for one in each} for each in answers]
    by_all = sorted(set.intersection(*map(set, by_id)))
    samples = [
        pages.Sample(
            _as_text(by_id[0][number].prompt),
            tuple(_answer(name, each[number]) for name, each in zip(report.names, by_id, strict=True)),
        )
        for number in by_all[:SHOWN]
    ]
    blank = ("",) * (len(report.names) - 1)
    closing = pages.Table(figures_headers, (*figures_rows, *((name, value, *blank) for name, value in rows)))
    summary = pages.Summary(
        facts=facts | {"found": verdict(report)},
        figures=tuple(
            pages.Figure(name.replace("_", " "), shown(figure)) for name, figure in headline.items() if figure.interval
        ),
        closing=closing,
        samples=tuple(samples),
    )
    return render_report([RunReport(" against ".join(report.names), [], summary)])


def _answer(name: str, prompt: AnsweredPrompt) -> pages.Answer:
    answer = prompt.answers[0]
    scores = {} if answer.reward is None else {"reward": answer.reward}
    return pages.Answer(name, answer.response, scores, answer.finished)


def _as_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    return (
        prompt if isinstance(prompt, str) else "\n".join(f"{one['role']}: {one.get('content') or ''}" for one in prompt)
    )
