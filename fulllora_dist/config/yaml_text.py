"""YAML as text: values keep what was written, and become numbers or words by the setting they are for (core/settings).

Null is empty, `null` or `~`. A key that is written twice is refused.
"""

import os
import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.core.settings import PlainText

_NULL = ("", "~", "null", "Null", "NULL")
_PLAIN = "!plain"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's rules for booleans, numbers and dates."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def _plain(_: Any, node: Any) -> PlainText | None:
    return None if node.value in _NULL else PlainText(node.value)


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])
_Loader.add_implicit_resolver(_PLAIN, re.compile(""), None)
_Loader.add_constructor(_PLAIN, _plain)


def read_yaml(path: str, option: str) -> dict[str, Any]:
    """The sections of a file.

    Args:
        option: that named the file, for messages.

    Raises:
        UserError: there is no such file, or it is not YAML with sections.
    """
    if not os.path.isfile(path):
        is_folder = "is a folder, not a YAML file" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{option}: {path} {is_folder}; see configs/ for examples")
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = _with_text_keys(yaml.load(file, _Loader))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: an alias refers to what it is in") from None
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"is a {'list' if isinstance(values, list) else 'single value'}"
        raise UserError(f"{path} {what}; it must contain settings, key: value")
    return values


def parse_value(text: str) -> Any:
    """The value of `key=text`: a list [a, b], a section {a: b} or quoted text as in YAML, else the text itself, so that
    a path may hold any character.

    Raises:
        UserError: brackets or quotes that are no YAML.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        return None if text in _NULL else PlainText(text)
    try:
        return _with_text_keys(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        problem = _problem(error).partition(": ")[2]
        raise UserError(
            f"{text} is not valid YAML ({problem}); put text that begins with {text[0]} in quotes"
        ) from None


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {"null" if key is None else str(key): _with_text_keys(part) for key, part in value.items()}
    return [_with_text_keys(part) for part in value] if isinstance(value, list) else value


def _problem(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return one_line(error)
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "unknown"
    if "character '\\t'" in problem:
        problem = "a tab; indent with spaces"
    elif re.search("alias|anchor|directive|cannot start any token|constructor for the tag", problem):
        problem += "; quote a value that begins with * & ! % @ or `"
    return f"line {mark.line + 1 if mark else 1}: {problem}"
