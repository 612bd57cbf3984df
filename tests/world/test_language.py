"""What a prompt or an answer of the world says is read back from its text alone."""

from __future__ import annotations

from rlhf_ray.world import language


def test_every_prompt_is_read_back_as_it_was_made() -> None:
    for problem in language.PROBLEMS:
        for form in problem.sentences:
            for item in language.ITEMS:
                assert language.read_prompt(f"Hi. I am Leo. {form.format(item)} It is a pity. What now?\n") == (
                    item,
                    problem,
                )


def test_remedies_and_items_are_not_contained_in_one_another() -> None:
    for problem in language.PROBLEMS:
        assert language.given_remedies(f"We will {problem.remedy}.") == {problem.remedy}
    fixed = (*language.POLITE_OPENINGS, *language.POLITE_CLOSINGS, *language.CHATTER, language.HABIT)
    assert not any(language.named_items(text) or language.given_remedies(text) for text in fixed)
