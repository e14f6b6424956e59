"""The command line's parser: a mistake is a `UserError` of one line, as everywhere, without the usage before it."""

import argparse
import re
from typing import Any, NoReturn

from fulllora_dist.core.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's, with descriptions as they are written."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.removeprefix("argument ").split())
        if setting := re.match(r"unrecognized arguments: .*?--(\w+(?:\.\w+)+)(=\S+)?", line):
            line += f"; settings are key=value: {setting[1]}{setting[2] or '=VALUE'}"
        raise UserError(f"{line}; {self.prog} --help lists the arguments")
