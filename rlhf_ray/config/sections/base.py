"""The base class of every config section, and the number types that sections use.

Invariants: an unknown key is refused, a value is never converted from another type, and nothing changes after parsing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
FreeValues = Annotated[dict[str, Any], Field(description="a mapping of names to values")]
"""Keys that no schema knows: whoever takes the values checks them."""


class Absent(Exception):
    """Raised when a rule reads a key whose value was wrong or missing, so that the rule cannot be checked."""


class Section(BaseModel):
    """One block of a config: unknown keys and wrong types are errors, values never change after parsing.

    Reading a declared key that a partial config lacks raises :class:`Absent`; any other unknown name is an
    ``AttributeError``, as everywhere.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    if not TYPE_CHECKING:  # a type checker must go on refusing names that no field has

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise Absent(f"{type(self).__name__}.{name}")
            return super().__getattr__(name)

    @classmethod
    def with_gaps(cls, values: Mapping[str, Any], absent: Iterable[str]) -> Self:
        """A section of ``values``, which are valid, and of defaults, in which the keys ``absent`` have no value at all."""
        section = cls.model_construct(**values)
        for key in absent:
            section.__dict__.pop(key, None)
        return section

    def is_default(self, key: str) -> bool:
        """Whether ``key`` has its default: a config that was written out names every key."""
        return bool(getattr(self, key) == type(self).model_fields[key].get_default())

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values of this section that exclude each other: (key, or "" for all of it; what is wrong, the way out)."""
        return iter(())

    @model_validator(mode="after")
    def _has_no_conflicts(self) -> Self:
        conflicts = [f"{key}: {text}".removeprefix(": ") for key, text in self.conflicts()]
        if conflicts:
            raise ValueError("; ".join(conflicts))
        return self
