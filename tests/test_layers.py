"""The order of the package's rooms: each imports only rooms below it, lazy imports counted."""

from tools.draw_architecture import LAYERS, PICTURE, imports, modules, picture, room

BESIDE: dict[tuple[str, str], str] = {}


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
    rooms = {room(module) for module in modules()}
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


def test_the_picture_is_of_this_code() -> None:
    assert PICTURE.read_text() == picture(), "run python tools/draw_architecture.py"
