"""Pages from templates: text is escaped, and a page loads nothing.

Invariants: every value that a template is given is text, but for charts, which escape their own, and the stylesheet. A name
that a template asks for and is not given is an error.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_ray.monitoring.report.charts import number

STYLE = Path(__file__).with_name("style.css")


def render(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of ``values``."""
    return _environment().get_template(template).render(style=Markup(STYLE.read_text()), **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(STYLE.parent), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"number": number, "percent": "{:.1%}".format, "trusted_svg": Markup}
    return environment
