"""The base class of all settings, the text that they are read from, and field types shared by several sections.

A plain value of a YAML file or the command line stays text until its setting says what it is, so that a name may be
`007`, `2026-11-30` or `off`. Numbers are those of YAML 1.2's core schema: `1e-3` is one, `010` is ten.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(?:(inf|Inf|INF)|nan|NaN|NAN)")
_TRUTH = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
# what YAML 1.1, which many programs read, takes for a boolean, a number of base 8, 60 or with separators
_OLD_YAML = re.compile(r"(yes|no|on|off)|[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+|[-+]?[0-9]+(_[0-9]+)+", re.I)


class PlainText(str):
    """A value as it was written without quotes."""

    def number(self) -> int | float | str:
        """The number that it is in YAML 1.2, else the text."""
        if _INTEGER.fullmatch(self):
            return int(self, 0) if self[:2] in ("0o", "0x") else int(self)
        if _FLOAT.fullmatch(self):
            return float(self)
        if match := _NOT_FINITE.fullmatch(self):
            return float(match[1] + ("inf" if match[2] else "nan"))
        return str(self)

    def untyped(self) -> bool | int | float | str:
        """Its value where no setting gives a type, as in the arguments of timm and DeepSpeed.

        Raises:
            ValueError: another value in YAML 1.1.
        """
        if _OLD_YAML.fullmatch(self):
            raise ValueError(
                f"{self} means one thing in YAML 1.1 and another in 1.2; write true, false, a plain number, or "
                f'"{self}" for text'
            )
        return _TRUTH[self] if self in _TRUTH else self.number()


class Settings(BaseModel):
    """Base class of all sections: unknown keys are rejected, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: Any) -> Any:
        """Give plain text the type of its field."""
        if not isinstance(values, Mapping):
            return values
        return {key: _typed(key, value, cls.model_fields.get(key)) for key, value in values.items()}


def _typed(key: str, value: Any, field: Any) -> Any:
    if field is None or value is None:
        return value
    kinds = _kinds(field.annotation)
    if any(issubclass(kind, BaseModel) for kind in kinds):
        return value  # it reads its own
    if Any in kinds:
        convert: Callable[[PlainText], Any] = PlainText.untyped
    else:
        convert = str if str in kinds else PlainText.number
    if type(None) in kinds and str in kinds and isinstance(value, PlainText) and value in ("None", "none"):
        raise _refusal(key, f'{value} is text; write null to leave it unset, or "{value}"')
    try:
        return _converted(value, convert)
    except ValueError as error:
        raise _refusal(key, str(error)) from None


def _refusal(key: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("setting", "{reason}", {"key": key, "reason": reason})


def _kinds(annotation: Any) -> set[Any]:
    """The types that are somewhere in an annotation; those of a literal's values."""
    if annotation is Any:
        return {Any}
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is None:
        return {annotation} if isinstance(annotation, type) else set()
    if str(origin) == "typing.Literal":
        return {type(part) for part in parts}
    if origin is Annotated:
        return _kinds(parts[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        parts = parts[1:]
    return set().union(*(_kinds(part) for part in parts))


def _converted(value: Any, convert: Callable[[PlainText], Any]) -> Any:
    if isinstance(value, PlainText):
        return convert(value)
    if isinstance(value, Mapping):
        return {key: _converted(part, convert) for key, part in value.items()}
    return [_converted(part, convert) for part in value] if isinstance(value, list) else value


def as_text(path: Any) -> Any:
    """A `Path` as a string; anything else, such as a URL, is unchanged."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _location(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"must be a path or URL, got {text!r}")
    return os.path.expanduser(text)


Location = Annotated[str, BeforeValidator(as_text), AfterValidator(_location)]
"""A path, relative to the working directory, or a URL; `~` is the home folder."""


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


def first_error(error: ValidationError) -> Any:
    """The error to describe. Unknown keys come first: a typo also leaves a key missing."""
    errors = error.errors()
    details = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if details["type"] == "setting":  # found before the fields are looked at
        details["loc"] = (*details["loc"], details["ctx"]["key"])
        details["input"] = None
    return details


def explain(error: ValidationError, suggest: Callable[[Sequence[Any], str], str] | None = None) -> str:
    """Describe the first validation error and how to fix it.

    Args:
        suggest: what to say about an unknown key of the section at a location.
    """
    details = first_error(error)
    *section, key = details["loc"] or ("",)
    name = ".".join(str(part) for part in details["loc"])
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        return f"unknown setting {name}" + (f"; {suggest(section, str(key))}" if suggest else "")
    if kind == "missing":
        return f"{name} is missing; it has no default"
    message = details["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        message = "must be a section of settings" + (
            "; it is empty: remove it, or write its settings" * (given is None)
        )
    elif kind in ("tuple_type", "list_type"):
        message = "must be a list" + (f"; write [{given}]" if isinstance(given, str) else "")
    if not name or message.startswith(f"{name}."):  # a check of a section names the setting itself
        return message
    said = repr(given) in message or ", got " in message
    shown = given is not None and not isinstance(given, Mapping) and not said
    return f"{name}: {message}" + (f" (got {' '.join(repr(given).split())[:100]})" if shown else "")
