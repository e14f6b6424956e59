"""The base class of all settings, and field types shared by several sections."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Settings(BaseModel):
    """Base class of all sections: unknown keys are rejected, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]


Decay = Annotated[float, Field(ge=0, lt=1)]


Area = Annotated[float, Field(gt=0, le=1)]


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of all settings, those of a section as `section.name`; an empty section is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class of a field that is a section or a tuple of sections, else None."""
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def explain(error: ValidationError, known_keys: Callable[[Sequence[Any]], Sequence[str]]) -> str:
    """Describe the first validation error and how to fix it. Unknown keys come first: a typo also leaves a key missing.

    Args:
        known_keys: returns the valid keys of the section at a location.
    """
    errors = error.errors()
    details = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    *section, key = details["loc"] or ("",)
    name = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        known = known_keys(section)
        near = difflib.get_close_matches(str(key), known, n=1) or difflib.get_close_matches(str(key), known, 1, 0.3)
        return f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
    if details["type"] == "missing":
        return f"{name} is missing; it has no default"
    message = details["msg"].removeprefix("Value error, ")
    if not name or message.startswith(f"{name}."):  # a check of a section names the setting itself
        return message
    given = details["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) and repr(given) not in message else ""
    return f"{name}: {message}{shown}"
