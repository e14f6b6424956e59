"""Load a `Config` from a YAML file and `key=value` arguments; any error is a single clear line."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from fulllora_dist.checkpoints.settings import RunSettings
from fulllora_dist.config.plugins import import_plugins
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import explain, section_of
from fulllora_dist.methods.settings import METHOD_SETTINGS
from fulllora_dist.tracking.settings import TrackingSettings


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Load and validate a config file, with `key=value` overrides (`optim.lr=1e-3`).

    A file may inherit from another one, given relative to itself under `base`; its own keys take precedence.

    Raises:
        UserError: an invalid setting or file, which the message names.
    """
    merged = _read(path)
    settings = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{override!r} is not a setting; write key=value, e.g. optim.lr=1e-3")
        # a bare name would be overwritten by a following setting of the method
        named = key == "method" and not value.lstrip().startswith(("{", "["))
        settings.append(f"method.name={value}" if named else override)
    try:
        merged = _merge(merged, OmegaConf.from_dotlist(settings))
        values: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    plugins = values.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise UserError(
            f"{path}: plugins: must be a list of modules or files, got {plugins!r}; write plugins=[{plugins}]"
        )
    import_plugins(plugins)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, lambda section: _known_keys(section, values))}") from None


def read_frame(path: Path, output_dir: str | None = None) -> Config:
    """Load only `run` and `tracking` of a resolved config, without importing the plugins that the rest may need.

    Args:
        output_dir: the run's output folder as seen from here, in case it is mounted at a different path.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        moved = {} if output_dir is None else {"output_dir": output_dir}
        parts: dict[str, Any] = {
            "run": RunSettings.model_validate(values["run"] | moved),
            "tracking": TrackingSettings.model_validate(values["tracking"]),
        }
        return Config.model_construct(**parts)
    except Exception as error:  # a disk error, invalid YAML, or settings of another version
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:150]})") from None


def _merge(below: Any, above: Any) -> Any:
    """Merge two configs; keys of `above` take precedence. Choosing another method drops the settings of the old one."""
    old, new = below.get("method"), above.get("method")
    if isinstance(old, str):
        below["method"] = old = {"name": old}
    if OmegaConf.is_dict(old) and OmegaConf.is_dict(new) and "name" in new and new["name"] != old.get("name"):
        del below["method"]
    try:
        return OmegaConf.merge(below, above)
    except (TypeError, OmegaConfBaseException):
        raise UserError(
            f"{', '.join(map(str, above))}: cannot merge a section with a list or value; write a section in both files"
        ) from None


def _read(path: str, named_by: Sequence[str] = ()) -> Any:
    if not os.path.isfile(path):
        raise UserError(f"--config: {path} does not exist; see configs/ for examples")
    try:
        values: Any = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_first_line(error)}") from None
    if not OmegaConf.is_dict(values):
        raise UserError(f"{path} is empty or a list; it must contain sections such as model: and data:")
    base = values.pop("base", None)
    if base is None:
        return values
    chain = (*named_by, os.path.realpath(path))
    below = os.path.join(os.path.dirname(path), str(base))
    if os.path.realpath(below) in chain:
        raise UserError(f"{path}: base: {base} refers back to itself; name a different file")
    return _merge(_read(below, chain), values)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _known_keys(location: Sequence[Any], values: Any) -> list[str]:
    """The valid keys of the section at `location`."""
    model: type[BaseModel] | None = Config
    for part in location:
        values = values[part]
        if part == "method":
            return list(METHOD_SETTINGS[values["name"]].model_fields)
        if isinstance(part, str):  # a number is an index in a list of sections
            field = model.model_fields.get(part) if model else None
            model = section_of(field.annotation) if field else None
    return list(model.model_fields) if model else []
