"""The package's rooms and what imports what, as docs/architecture.svg: `python tools/draw_architecture.py`.

Everything in it is read from the code: the rows from `LAYERS`, to which tests/test_layers.py holds the imports, what a
room is from the first sentence of its docstring, the arrows from the import statements.
"""

import ast
import re
import textwrap
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fulllora_dist"
PICTURE = ROOT / "docs" / "architecture.svg"

LAYERS = (
    ("train", "evaluate"),  # scripts that nobody imports
    ("commands",),
    ("launching", "studies"),
    ("__init__",),
    ("training",),
    ("registry",),
    ("config",),
    ("evaluation",),
    ("methods", "distributed", "tracking"),
    ("models", "data", "checkpoints"),
    ("attacks", "plots", "storage"),
    ("core",),
)
"""From the top down; rooms of one line do not import each other."""

TITLES = {"__init__": "fulllora_dist", "train": "train.py", "evaluate": "evaluate.py"}
COLOURS = ("#eef2f7", "#eef2f7", "#eef2f7", "#e3f1ec", "#fdf1e3", "#fdf1e3", "#f3eefa", "#fdf1e3") + ("#e6f0fb",) * 4
WIDTH, MARGIN, GAP, BETWEEN, SINGLE = 900, 20, 18, 30, 470
LANES = (0.0, -5.0, 5.0, -2.5, 2.5, -7.5, 7.5)
"""Where arrows that pass one gap between two rooms run, from its middle."""


def module_name(path: Path) -> str:
    """`fulllora_dist/data/plan.py` -> `data.plan`; a package's own file is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports() -> dict[str, set[str]]:
    """Every module's imports of the package's other modules, those inside functions too."""
    files = modules()
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                module = node.module or ""
                names = [f"{module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                module, names = "", [alias.name for alias in node.names]
            else:
                continue
            for full in names:
                if full.split(".")[0] != PACKAGE.name:
                    continue
                target = full.removeprefix(f"{PACKAGE.name}.")
                found[name].add(target if target in files else target.rpartition(".")[0] or "__init__")
    return found


def room(module: str) -> str:
    """The folder or top-level file that a module belongs to."""
    return module.partition(".")[0]


def room_imports() -> Counter[tuple[str, str]]:
    """(room, imported room) -> how many pairs of modules."""
    pairs = ((room(module), room(target)) for module, targets in imports().items() for target in targets)
    return Counter(pair for pair in pairs if pair[0] != pair[1])


def reduced(edges: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges without those that a longer path implies."""
    below: dict[str, set[str]] = defaultdict(set)
    for name in (name for names in reversed(LAYERS) for name in names):
        for _, target in (edge for edge in edges if edge[0] == name):
            below[name] |= {target} | below[target]
    return sorted(
        (a, b) for a, b in edges if not any(b in below[other] for start, other in edges if start == a and other != b)
    )


def holds(name: str) -> tuple[str, str]:
    """(the first sentence of a room's docstring, the names of its modules)."""
    files = modules()
    sentence = re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(ast.parse(files[name].read_text())) or "")[0]
    inside = (module.split(".")[1] for module in files if module.startswith(f"{name}."))
    return " ".join(sentence.split()).replace("`", ""), ", ".join(dict.fromkeys(inside))


class Box:
    """A room in the picture. Sizes in pixels."""

    def __init__(self, name: str, x: float, width: float):
        self.name, self.x, self.width = name, x, width
        sentence, inside = holds(name)
        self.sentence = textwrap.wrap(sentence, int((width - 20) / 6.5))
        self.inside = textwrap.wrap(inside, int((width - 20) / 5.9), break_long_words=False)
        self.height = 30 + 15 * len(self.sentence) + 14 * len(self.inside)
        self.y = 0.0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    def svg(self, colour: str) -> list[str]:
        lines = [
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="8" '
            f'fill="{colour}" stroke="#9aa8b8"/>',
            _text(self.x + 10, self.y + 19, TITLES.get(self.name, self.name), 'class="room"'),
        ]
        y = self.y + 19
        for kind, texts, step in (("holds", self.sentence, 15), ("inside", self.inside, 14)):
            for text in texts:
                y += step
                lines.append(_text(self.x + 10, y, text, f'class="{kind}"'))
        return lines


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{escape(text)}</text>'


def _rows() -> list[list[Box]]:
    rows, y = [], 76.0
    for names in LAYERS:
        each = SINGLE if len(names) == 1 else (WIDTH - 2 * MARGIN - GAP * (len(names) - 1)) / len(names)
        first = (WIDTH - SINGLE) / 2 if len(names) == 1 else MARGIN
        row = [Box(name, first + i * (each + GAP), each) for i, name in enumerate(names)]
        height = max(box.height for box in row)
        for box in row:
            box.y, box.height = y, height
        rows.append(row)
        y += height + BETWEEN
    return rows


def _path(start: Box, end: Box, rows: list[list[Box]], out: float, into: float, taken: set[tuple[float, ...]]) -> str:
    """From the bottom of a box to the top of a lower one, through gaps of the rows between them. `taken`: (row, gap,
    lane) of the arrows before."""
    passed = []
    for row in (row for row in rows if start.y < row[0].y < end.y):
        straight = out + (into - out) * (row[0].y - start.y) / (end.y - start.y)
        gaps = [row[0].x - GAP / 2, *(box.x + box.width + GAP / 2 for box in row)]
        passed.append((row[0], min(gaps, key=lambda gap: abs(gap - straight))))
    lane = next(lane for lane in LANES if not taken & {(box.y, gap, lane) for box, gap in passed})
    taken |= {(box.y, gap, lane) for box, gap in passed}
    points = [(out, start.y + start.height)]
    for box, gap in passed:
        points += [(gap + lane, box.y), (gap + lane, box.y + box.height)]
    points.append((into, end.y - 5))
    d = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x1, y1), (x2, y2) in pairwise(points):
        bend = (y2 - y1) / 2
        d += f" C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    return d


def _arrows(rows: list[list[Box]], edges: Counter[tuple[str, str]]) -> list[str]:
    boxes = {box.name: box for row in rows for box in row}
    drawn = reduced(edges)
    leaving = {n: sorted((e for e in drawn if e[0] == n), key=lambda e: (boxes[e[1]].middle, e)) for n in boxes}
    coming = {n: sorted((e for e in drawn if e[1] == n), key=lambda e: (boxes[e[0]].middle, e)) for n in boxes}

    def port(box: Box, edge: tuple[str, str], among: list[tuple[str, str]]) -> float:
        return box.x + box.width * (among.index(edge) + 1) / (len(among) + 1)

    lines, taken = [], set()
    for a, b in drawn:
        out, into = port(boxes[a], (a, b), leaving[a]), port(boxes[b], (a, b), coming[b])
        d = _path(boxes[a], boxes[b], rows, out, into, taken)
        lines.append(f'<path d="{d}" class="arrow" stroke-width="{1 + edges[a, b] ** 0.5 / 2:.1f}"/>')
        lines.append(f'<path d="M{into - 4:.1f} {boxes[b].y - 7:g} h8 l-4 7 z" fill="#5b7089"/>')
    return lines


def _matrix(edges: Counter[tuple[str, str]], top: float) -> tuple[list[str], float]:
    """All imports: row imports column; everything lies right of the diagonal, as every arrow points down."""
    names = [name for layer in LAYERS for name in layer]
    cell, left = 42, 132
    lines = [
        _text(
            MARGIN,
            top,
            "All imports: pairs of a module of the row and a module of the column that it imports",
            'class="head"',
        )
    ]
    top += 84
    most = max(edges.values())
    columns = names[2:]  # nobody imports the scripts
    for j, name in enumerate(columns):
        x, y = left + cell * (j + 0.6), top - 8
        lines.append(
            f'<text x="{x:g}" y="{y:g}" class="axis" transform="rotate(-50 {x:g} {y:g})">'
            f"{escape(TITLES.get(name, name))}</text>"
        )
    for i, name in enumerate(names[:-1]):
        y = top + 20 * i
        lines.append(_text(left - 8, y + 14, TITLES.get(name, name), 'class="axis" text-anchor="end"'))
        for j, target in enumerate(columns):
            x, count = left + cell * j, edges[name, target]
            shade = 0.12 + 0.55 * (count / most) ** 0.5 if count else 0.0
            fill = f'fill="#2f6db5" fill-opacity="{shade:.2f}"' if count else 'fill="#f5f6f8"'
            if name == target:
                fill = 'fill="#c9d2dc"'
            lines.append(f'<rect x="{x}" y="{y:g}" width="{cell - 2}" height="18" {fill}/>')
            if count:
                lines.append(_text(x + cell / 2 - 1, y + 13, str(count), 'class="count"'))
    return lines, top + 20 * (len(names) - 1)


def picture() -> str:
    """The SVG; the same code always gives the same bytes."""
    edges, rows = room_imports(), _rows()
    house = [line for row, colour in zip(rows, COLOURS, strict=True) for box in row for line in box.svg(colour)]
    bottom = rows[-1][0].y + rows[-1][0].height
    matrix, end = _matrix(edges, bottom + 56)
    height = end + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" font-family="Helvetica, Arial, sans-serif">',
            "<style>.room{font-size:15px;font-weight:bold;fill:#1d2733}.holds{font-size:12px;fill:#1d2733}"
            ".inside{font-size:11px;fill:#5b6b7c}.head{font-size:15px;font-weight:bold;fill:#1d2733}"
            ".note{font-size:12px;fill:#5b6b7c}.axis{font-size:12px;fill:#1d2733}"
            ".count{font-size:11px;fill:#0d1b2a;text-anchor:middle}"
            ".arrow{fill:none;stroke:#5b7089;stroke-opacity:.75}</style>",
            f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>',
            _text(MARGIN, 32, "fulllora_dist: each row imports only rows below it", 'class="head"'),
            _text(
                MARGIN,
                52,
                "Arrows are imports, thicker where more modules do; those that a longer path implies are left out.",
                'class="note"',
            ),
            *_arrows(rows, edges),
            *house,
            *matrix,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
