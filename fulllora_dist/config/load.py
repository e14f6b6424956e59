"""Load a `Config` from a YAML file and `key=value` arguments; any error is a single clear line."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from fulllora_dist.checkpoints.settings import RunSettings
from fulllora_dist.config.plugins import import_plugins
from fulllora_dist.config.schema import Config
from fulllora_dist.config.yaml_text import parse_value, read_yaml
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.core.settings import PlainText, explain, first_error, section_of
from fulllora_dist.core.suggest import suggestion
from fulllora_dist.methods.settings import METHOD_SETTINGS, MethodSettings
from fulllora_dist.tracking.settings import TrackingSettings

COMMAND_LINE = "command line"


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Load and validate a config file, with `key=value` overrides (`optim.lr=1e-3`).

    A file may inherit from another one, given relative to itself under `base`; its own keys take precedence.

    Raises:
        UserError: an invalid setting or file, which the message names.
    """
    layers = _Layers()
    layers.read(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise UserError(f"{override!r} is not a setting; write key=value, e.g. optim.lr=1e-3")
        if not text.strip():
            raise UserError(f"{COMMAND_LINE}: {override} has no value; write {key}=null for none, or remove it")
        try:
            value = parse_value(text)
        except UserError as error:
            raise UserError(f"{COMMAND_LINE}: {key}: {error}") from None
        # a bare name would be overwritten by a following setting of the method
        if ".".join(names) in _METHOD_SECTIONS and isinstance(value, str):
            names.append("name")
        for name in reversed(names):
            value = {name: value}
        layers.add(value, COMMAND_LINE)
    values = layers.resolved()
    plugins = values.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise UserError(
            f"{layers.source(['plugins'])}: plugins: must be a list of modules or files, got {plugins!r}; "
            f"write plugins=[{plugins}]"
        )
    import_plugins(map(os.path.expanduser, plugins))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        message = explain(error, lambda section, key: _suggest(section, key, values))
        raise UserError(f"{layers.blamed(first_error(error)['loc'], message)}: {message}") from None


def read_frame(path: Path, output_dir: str | None = None) -> Config:
    """Load only `run` and `tracking` of a resolved config, without importing the plugins that the rest may need.

    Args:
        output_dir: the run's output folder as seen from here, in case it is mounted at a different path.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        values = read_yaml(str(path), "config")
        moved = {} if output_dir is None else {"output_dir": output_dir}
        parts: dict[str, Any] = {
            "run": RunSettings.model_validate(values["run"] | moved),
            "tracking": TrackingSettings.model_validate(values["tracking"]),
        }
        return Config.model_construct(**parts)
    except Exception as error:  # a disk error, invalid YAML, or settings of another version
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None


class _Layers:
    """Files and arguments, each above those before it, with the source of every setting."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        self._path = ""

    def read(self, path: str, named_by: Sequence[str] = (), option: str = "--config") -> None:
        """Add a file above the one that it names as its base."""
        path = os.path.expanduser(path)
        values = read_yaml(path, option)
        self._path = path
        base = values.pop("base", None)
        if base is not None:
            if not isinstance(base, str):
                raise UserError(f"{path}: base: must be one file, got {base!r}")
            chain = (*named_by, os.path.realpath(path))
            below = os.path.join(os.path.dirname(path), os.path.expanduser(base))
            if os.path.realpath(below) in chain:
                raise UserError(f"{path}: base: {base} refers back to itself; name a different file")
            self.read(below, chain, f"{path}: base")
            self._path = path
        self.add(values, path)

    def add(self, values: Mapping[str, Any], source: str) -> None:
        """Merge `values` over all before. Choosing another method drops the settings of the old one.

        Raises:
            UserError: a part of a list; a method that would drop what was typed for no method.
        """
        self._merge(self._values, values, source, "")

    def _merge(self, below: dict[str, Any], above: Mapping[str, Any], source: str, prefix: str) -> None:
        for key, value in above.items():
            name, old = f"{prefix}{key}", below.get(key)
            if name in _METHOD_SECTIONS:
                below[key] = old = self._kept_method(name, old, value)
            if isinstance(old, dict) and isinstance(value, dict):
                self._merge(old, value, source, f"{name}.")
                continue
            if isinstance(old, list) and isinstance(value, dict):
                raise UserError(f"{source}: {name}: is a list; write all of it, e.g. {name}=[...]")
            below[key] = value
            self._sources = {n: s for n, s in self._sources.items() if not n.startswith(f"{name}.")} | {name: source}

    def _kept_method(self, name: str, old: Any, new: Any) -> Any:
        """What `new` is merged over: nothing, where it is another method than `old`."""
        old = {"name": old} if isinstance(old, str) else old
        sections = isinstance(old, dict) and isinstance(new, dict)
        if not sections or new.get("name", old.get("name")) == old.get("name"):
            return old
        typed = [key for key in old if self.source([*name.split("."), key]) == COMMAND_LINE]
        if typed and "name" not in typed:  # else they are the old method's, such as those of a study's arm
            chosen = f"{name}={new['name']}"
            raise UserError(
                f"{COMMAND_LINE}: {name}.{typed[0]} stands before {chosen}, which drops it; write it after {chosen}"
            )
        return None

    def resolved(self) -> dict[str, Any]:
        """The values, with OmegaConf's `${...}` filled in.

        Raises:
            UserError: one that cannot be.
        """
        try:
            filled = OmegaConf.to_container(
                OmegaConf.create(_strings(self._values)), resolve=True, throw_on_missing=True
            )
        except OmegaConfBaseException as error:
            key = str(getattr(error, "full_key", None) or "")
            reason = one_line(str(error).splitlines()[0])
            raise UserError(f"{self.source(key.split('.'))}: {key}: {reason}") from None
        result: dict[str, Any] = _retyped(self._values, filled)
        return result

    def source(self, location: Sequence[Any]) -> str:
        """The file, or the command line, that a setting is from."""
        names = [str(part) for part in location]
        prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
        return next((self._sources[name] for name in prefixes if name in self._sources), self._path)

    def blamed(self, location: Sequence[Any], message: str) -> str:
        """The source to name for a message: of several settings that disagree, the command line's is the last word."""
        named = re.findall(r"[a-z]\w*(?:\.\w+)+|^[a-z]\w*(?=:)", message)
        sources = [self.source(location), *(self.source(name.split(".")) for name in named)] if location else []
        sources = sources or [self.source(name.split(".")) for name in named]
        return COMMAND_LINE if COMMAND_LINE in sources else next(iter(sources), self._path)


def _strings(value: Any) -> Any:
    """Plain text as ordinary strings, which OmegaConf takes."""
    if isinstance(value, dict):
        return {key: _strings(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strings(part) for part in value]
    return str(value) if isinstance(value, PlainText) else value


def _retyped(before: Any, after: Any) -> Any:
    if isinstance(before, dict):
        return {key: _retyped(part, after[key]) for key, part in before.items()}
    if isinstance(before, list):
        return [_retyped(*pair) for pair in zip(before, after, strict=True)]
    return PlainText(after) if isinstance(before, PlainText) and isinstance(after, str) else after


def _suggest(location: Sequence[Any], key: str, values: Any) -> str:
    """What to say about the unknown `key` of the section at `location`."""
    model: type[BaseModel] | None = Config
    for part in location:
        values = values[part]
        if isinstance(part, str):  # a number is an index in a list of sections
            field = model.model_fields.get(part) if model else None
            model = METHOD_SETTINGS[_name(values)] if part in _METHODS else section_of(field and field.annotation)
    known = list(model.model_fields) if model else []
    elsewhere = {name: f"it is {' or '.join(places)}" for name, places in _places().items()}
    if location and location[-1] in _METHODS:
        known.remove("name")
        for name, methods in _method_settings().items():
            takes = f"{_name(values)} takes {', '.join(known) or 'no settings'}"
            elsewhere[name] = f"it is a setting of {', '.join(methods)}; {takes}"
    return suggestion(key, known, elsewhere)


_METHODS = ("method", "rollback_method")
_METHOD_SECTIONS = ("method", "guard.rollback_method")


def _name(method: Any) -> str:
    return method if isinstance(method, str) else method["name"]


def _places() -> dict[str, list[str]]:
    """The full names of all settings by their last part."""
    places: dict[str, list[str]] = {}

    def add(model: type[BaseModel], prefix: str) -> None:
        for key, field in model.model_fields.items():
            section = section_of(field.annotation)
            one = section is field.annotation  # not a list of them
            if section is not None and one and not issubclass(section, MethodSettings):
                add(section, f"{prefix}{key}.")
            else:
                places.setdefault(key, []).append(prefix + key)

    add(Config, "")
    for name in _method_settings():
        places.setdefault(name, []).append(f"method.{name}")
    return places


def _method_settings() -> dict[str, list[str]]:
    """The methods that take a setting."""
    takers: dict[str, list[str]] = {}
    for name, settings in METHOD_SETTINGS.items():
        for key in settings.model_fields.keys() - {"name"}:
            takers.setdefault(key, []).append(name)
    return takers
