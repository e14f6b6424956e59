"""The order of the package's rooms: each imports only rooms below it, lazy imports counted."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fulllora_dist"

LAYERS = (
    ("train", "evaluate"),  # scripts that nobody imports
    ("commands",),
    ("launching",),
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

BESIDE: dict[tuple[str, str], str] = {}


def module_name(path: Path) -> str:
    """`fulllora_dist/data/plan.py` -> `data.plan`; a package's own file is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports() -> dict[str, set[str]]:
    """Every module's imports of the package's other modules, those inside functions too."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
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
                found[name].add(target if target in modules else target.rpartition(".")[0] or "__init__")
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def test_no_import_runs_up_or_sideways() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    bad = []
    for module, targets in imports().items():
        for target in targets:
            mine, theirs = room(module), room(target)
            if mine != theirs and level[theirs] <= level[mine] and (module, target) not in BESIDE:
                bad.append(f"{module} -> {target}")
    assert not sorted(bad)


def test_every_room_has_its_line() -> None:
    rooms = {room(module_name(path)) for path in PACKAGE.rglob("*.py")}
    assert rooms == {name for names in LAYERS for name in names}


def test_no_circle_of_modules() -> None:
    graph, done = imports(), set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())


def test_settings_import_core_alone() -> None:
    for module, targets in imports().items():
        if module.endswith(".settings"):
            assert {room(target) for target in targets} <= {"core"}, module
