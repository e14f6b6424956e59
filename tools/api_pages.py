"""The API pages: HTML that pdoc builds from the docstrings of the public face, offline: `make docs`.

    python tools/api_pages.py [--output build/docs]

One page has every name of `fulllora_dist.__all__`, the others the settings that its functions take by keyword.
"""

import importlib
import re
import textwrap
import types
from pathlib import Path
from typing import Any

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError

SETTINGS = ("fulllora_dist.models.settings", "fulllora_dist.methods.settings")
EXAMPLE = re.compile(r"^Example:\n((?:[ ]+.*\n?|\n)+)", re.MULTILINE)


def public_face() -> types.ModuleType:
    """`fulllora_dist` with its public names alone: there pdoc would take the script evaluate.py for `evaluate`."""
    import fulllora_dist as fd

    summary, _, code = (fd.__doc__ or "").partition("\n\n")
    face = types.ModuleType(fd.__name__, f"{summary}\n\n```python\n{code}```\n")
    face.__dict__["__all__"] = fd.__all__
    face.__dict__.update({name: getattr(fd, name) for name in fd.__all__})
    return face


def fence_examples(doc: Any) -> None:
    """Make blocks of code of the examples in pdoc's `doc` and its members, where Markdown would see a paragraph."""
    doc.docstring = EXAMPLE.sub(
        lambda match: f"###### Example:\n```python\n{textwrap.dedent(match[1]).strip()}\n```\n", doc.docstring
    )
    for member in getattr(doc, "members", {}).values():
        fence_examples(member)


def build(output: Path) -> None:
    """Write the pages; index.html leads to the public face.

    Raises:
        UserError: pdoc is not installed.
    """
    try:
        import pdoc.doc
        import pdoc.render
    except ImportError:
        raise UserError("the API pages need pdoc: pip install 'fulllora-dist[docs]'") from None
    pdoc.render.configure(docformat="google", search=False, show_source=False)
    modules = [public_face(), *map(importlib.import_module, SETTINGS)]
    docs = {module.__name__: pdoc.doc.Module(module) for module in modules}
    for name, doc in docs.items():
        fence_examples(doc)
        page = output / f"{name.replace('.', '/')}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(pdoc.render.html_module(doc, docs))
    (output / "index.html").write_text(pdoc.render.html_index(docs))


def main() -> None:
    """Build the pages."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/docs"), help="folder (default: build/docs)")
    output = parser.parse_args().output
    build(output)
    print(f"API pages: {output}/index.html")


if __name__ == "__main__":
    run_entry(main)
