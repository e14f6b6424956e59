"""Plugins: modules outside the package that register methods and families when imported."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line

GROUP = "fulllora_dist.plugins"
"""Entry point group of installed packages, which are imported without being named in a config."""


def import_plugins(names: Iterable[str]) -> None:
    """Import the installed plugins, then the named ones.

    Args:
        names: modules on Python's path or in the working directory, or paths of .py files, which are imported as
            modules under the name of the file.

    Raises:
        UserError: a plugin cannot be imported; the message names it and the reason.
    """
    for entry in entry_points(group=GROUP):
        _import(entry.module)
    for name in names:
        _import(str(name))


def _import(name: str) -> None:
    try:
        if name.endswith(".py"):
            _import_file(name)
        else:
            if os.getcwd() not in sys.path:  # a script has its own folder on the path instead
                sys.path.append(os.getcwd())
            importlib.import_module(name)
    except Exception as error:  # third-party code may raise anything
        raise UserError(f"plugins: {name} cannot be imported ({type(error).__name__}: {one_line(error)})") from None


def _import_file(path: str) -> None:
    module_name = os.path.splitext(os.path.basename(path))[0]
    loaded = sys.modules.get(module_name)
    if loaded is not None:
        if loaded.__file__ is not None and os.path.samefile(loaded.__file__, path):
            return
        raise ImportError(f"another module has the name {module_name}; rename the file")
    spec = importlib.util.spec_from_file_location(module_name, os.path.abspath(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
