"""@champion: who gets it, what stays, and many at once against real stores."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from fulllora_dist.core.errors import UserError
from fulllora_dist.registry import champion
from fulllora_dist.registry.champion import LostRace, Outcome, promote, rollback
from fulllora_dist.registry.mlflow_client import StoreError
from fulllora_dist.registry.promotion import Rules
from fulllora_dist.registry.publish import publish
from fulllora_dist.registry.registry import Registry, Version
from tests.registry.conftest import evaluation, right

RULES = Rules(margin=0.01, clean_floor=0.5)
RACERS = 4


@pytest.fixture
def versions(registry: Registry, adapter: Callable[..., str], request: pytest.FixtureRequest) -> list[Version]:
    """Five versions of a model of the test's own; each is surely more robust than the one before."""
    name = f"{request.node.originalname}-{registry.store.uri.partition(':')[0]}"
    folders = [adapter(seed=i) for i in range(5)]
    scores = [100, 120, 140, 160, 180]
    return [
        publish(registry, folder, evaluation=evaluation(right(n)), name=name)
        for folder, n in zip(folders, scores, strict=True)
    ]


def address(version: Version) -> str:
    return f"{version.name}/{version.number}"


def test_a_life_of_champions(registry: Registry, versions: list[Version]) -> None:
    one, two, three, four, _ = versions
    name = one.name
    assert promote(registry, address(two), RULES).outcome == "promoted"
    assert registry.aliases(name) == {"champion": 2}

    refused = promote(registry, address(one), RULES)
    assert (refused.outcome, refused.champion) == ("refused", 2)
    assert "less robust by more than 1 point" in refused.verdict.reasons[0]
    assert registry.aliases(name) == {"champion": 2}
    assert promote(registry, address(two), RULES).outcome == "kept"

    with pytest.raises(UserError, match="--force needs a reason"):
        promote(registry, address(one), RULES, force=" ")
    forced = promote(registry, address(one), RULES, force="the images of 2 were mislabelled")
    assert (forced.outcome, forced.champion, forced.previous) == ("promoted", 1, 2)
    tags = registry.find(address(one)).tags
    assert tags["forced"] == "the images of 2 were mislabelled"
    assert "less robust" in tags["gate"]

    assert promote(registry, address(three), RULES).outcome == "promoted"
    assert promote(registry, f"models:/{name}/4", RULES).outcome == "promoted"
    assert registry.aliases(name) == {"champion": 4, "previous": 3}
    assert "forced" not in registry.find(address(four)).tags
    assert [rollback(registry, name, "slow")[0] for _ in range(3)] == [3, 1, 2]
    assert registry.aliases(name) == {"champion": 2}
    assert registry.find(address(four)).tags["rolled_back"].endswith(" slow")
    with pytest.raises(UserError, match="no version was @champion before version 2"):
        rollback(registry, name)
    assert not [tag for tag in registry.model(name).tags if tag.startswith("promotion.")], "claims are withdrawn"


def _race(uri: str, reference: str, start: Barrier, answers: Any) -> None:
    registry = Registry(uri)
    start.wait()
    answers.put((reference, _tried(registry, reference)))


def _tried(registry: Registry, reference: str) -> str:
    try:
        return promote(registry, reference, RULES).outcome
    except LostRace:
        return "lost"


def check_race(registry: Registry, results: dict[str, str], before: int) -> None:
    """One has won, it says so, the aliases say so, and everybody else knows."""
    name = next(iter(results)).partition("/")[0]
    winners = [reference for reference, outcome in results.items() if outcome == "promoted"]
    assert len(winners) == 1, results
    assert set(results.values()) <= {"promoted", "lost"}
    assert registry.aliases(name) == {"champion": int(winners[0].partition("/")[2]), "previous": before}
    assert not [tag for tag in registry.model(name).tags if tag.startswith("promotion.")]


@pytest.mark.long
def test_processes_at_once(registry: Registry, versions: list[Version]) -> None:
    promote(registry, address(versions[0]), RULES)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(RACERS), context.Queue()
    racers = [
        context.Process(target=_race, args=(registry.store.uri, address(version), start, answers))
        for version in versions[1:]
    ]
    for racer in racers:
        racer.start()
    results = dict(answers.get(timeout=200) for _ in racers)
    for racer in racers:
        racer.join()
    check_race(registry, results, before=1)


def test_threads_at_once(registry: Registry, versions: list[Version], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each continues at the same moment, once it has judged."""
    name = versions[0].name
    for _ in range(4):
        while len(registry.aliases(name)) > 1:
            rollback(registry, name)
        if not registry.aliases(name):
            promote(registry, address(versions[0]), RULES)
        judged = threading.Barrier(RACERS)
        fetch = registry.check

        def together(version: Version, judged: threading.Barrier = judged, fetch: Any = fetch) -> None:
            fetch(version)
            judged.wait()

        with monkeypatch.context() as patched, ThreadPoolExecutor(RACERS) as threads:
            patched.setattr(registry, "check", together)
            references = [address(version) for version in versions[1:]]
            results = dict(zip(references, threads.map(lambda r: _tried(registry, r), references), strict=True))
        check_race(registry, results, before=1)


def test_judged_against_one_that_is_champion_no_more(
    registry: Registry, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other promotion is over before this one takes its turn."""
    promote(registry, address(versions[0]), RULES)
    fetch = registry.check

    def meanwhile(version: Version) -> None:
        fetch(version)
        monkeypatch.setattr(registry, "check", fetch)
        assert promote(registry, address(versions[4]), RULES).outcome == "promoted"

    monkeypatch.setattr(registry, "check", meanwhile)
    with pytest.raises(LostRace, match="version 5 became @champion while version 2 was judged against version 1"):
        promote(registry, address(versions[1]), RULES)
    assert registry.aliases(versions[0].name) == {"champion": 5, "previous": 1}


class _Killed(BaseException):
    pass


def _die_at(registry: Registry, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The first n writing calls of the store are done, the next one is the last."""
    left = [n]
    store = registry.store
    names = ("set_registered_model_tag", "set_model_version_tag", "set_registered_model_alias")
    for name in (*names, "delete_registered_model_tag"):
        call = type(store).__getattr__(store, name)

        def dying(*args: Any, call: Any = call, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return call(*args, **settings)

        monkeypatch.setattr(store, name, dying, raising=False)


@pytest.mark.long
def test_killed_between_its_writes(
    registry: Registry, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops, the next promotion finds one champion and continues; the claim left counts for a while."""
    name = versions[0].name
    promote(registry, address(versions[0]), RULES)
    for writes in range(8):
        with monkeypatch.context() as patched:
            _die_at(registry, patched, writes)
            with pytest.raises(_Killed):
                promote(registry, address(versions[1]), RULES)
        assert registry.aliases(name)["champion"] in (1, 2)
        left = [tag for tag in registry.model(name).tags if tag.startswith("promotion.")]
        if left:
            with pytest.raises(LostRace, match="another promotion is under way"):
                promote(registry, address(versions[2]), RULES)
        with monkeypatch.context() as patched:
            patched.setattr(champion, "STALE_SECONDS", 0.0)
            patched.setattr(champion._Turn, "set", _patient(champion._Turn.set))
            now = registry.aliases(name)["champion"]
            outcome: Outcome = promote(registry, address(versions[3]), RULES)
            assert (outcome.outcome, outcome.previous) == ("promoted", now)
        assert registry.aliases(name) == {"champion": 4, "previous": now}
        while registry.aliases(name)["champion"] != 1:
            rollback(registry, name)
    assert not [tag for tag in registry.model(name).tags if tag.startswith("promotion.")]


def _patient(set_aliases: Any) -> Any:
    def patiently(turn: Any, champions: list[int], **settings: Any) -> None:
        turn._deadline += 100  # STALE_SECONDS is 0 here, so that the turn would be over at once
        set_aliases(turn, champions, **settings)

    return patiently


@pytest.fixture
def history(sqlite: str) -> tuple[Registry, str, list[int]]:
    """A model without files, and its champions in turn."""
    registry, name, champions = Registry(sqlite, create=True), "history", [1, 2, 3, 1]
    if name not in [model.name for model in registry.store.search_registered_models()]:
        registry.store.create_registered_model(name)
        for number in range(1, 5):
            registry.store.create_model_version(name, f"file:///nowhere/{number}")
    put(registry, name, champions)
    return registry, name, champions


def put(registry: Registry, name: str, champions: list[int]) -> None:
    registry.store.set_registered_model_tag(name, "champions", json.dumps(champions))
    registry.store.set_registered_model_alias(name, "champion", str(champions[-1]))


def read(registry: Registry, name: str) -> list[int]:
    with champion._turn(registry, name, "a check") as turn:
        return turn.champions()


@pytest.mark.parametrize("move", ["promotion", "rollback"])
def test_no_kill_loses_the_history(
    history: tuple[Registry, str, list[int]], move: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, name, before = history
    after = [*before, 4] if move == "promotion" else before[:-1]

    def change() -> None:
        if move == "rollback":
            rollback(registry, name)
            return
        with champion._turn(registry, name, "a promotion") as turn:
            turn.set(after)
            raise _Killed

    seen = set()
    for writes in range(5):
        with monkeypatch.context() as patched:
            _die_at(registry, patched, writes)
            with pytest.raises(_Killed):
                change()
        now = registry.aliases(name)["champion"]
        monkeypatch.setattr(champion, "STALE_SECONDS", 0.0)
        assert read(registry, name) == (after if now == after[-1] else before), writes
        monkeypatch.undo()
        seen.add(now)
        put(registry, name, before)
    assert seen == {before[-1], after[-1]}


def test_an_alias_that_was_moved_by_hand(history: tuple[Registry, str, list[int]]) -> None:
    registry, name, _ = history
    for number, champions in ((4, [1, 2, 3, 1, 4]), (2, [1, 2])):
        registry.store.set_registered_model_alias(name, "champion", str(number))
        assert read(registry, name) == champions


def test_no_way_back_to_a_deleted_version(sqlite: str) -> None:
    registry, name = Registry(sqlite, create=True), "deleted"
    registry.store.create_registered_model(name)
    for _ in range(2):
        registry.store.create_model_version(name, "file:///nowhere")
    put(registry, name, [1, 2])
    registry.store.delete_model_version(name, "1")
    with pytest.raises(UserError, match="deleted has no version 1; it has versions 2"):
        rollback(registry, name)
    assert json.loads(registry.model(name).tags["champions"]) == [1, 2]
    assert "rolled_back" not in registry.find("deleted/2").tags


def test_promoted_though_the_claim_stays(
    history: tuple[Registry, str, list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, name, _ = history

    def broken(*_: str) -> None:
        raise StoreError("MLflow at x: gone", "IO")

    with monkeypatch.context() as patched:
        patched.setattr(registry.store, "delete_registered_model_tag", broken, raising=False)
        assert rollback(registry, name) == (3, 1)
    assert capsys.readouterr().err == "warning: MLflow at x: gone: promotions of history are blocked for 5 minutes\n"
    monkeypatch.setattr(champion, "STALE_SECONDS", 0.0)
    read(registry, name)  # removes the claim
