"""Moving `@champion`, one promotion at a time.

MLflow's aliases have no compare-and-set, so promotions take turns by tags of the registered model:

1. A promotion writes a claim, a tag with a name of its own, and then reads all claims (writing before reading is what
   makes two at once see each other: at least one of them reads the other's).
2. If it finds an earlier claim, it withdraws its own and has lost. Later claims it waits out: they withdraw, or belong
   to a promotion that had begun before, which ends.
3. Alone, it checks that the champion still is the one that the candidate was judged against. If not, it has lost.
4. It writes the tag `champions`, the numbers of all champions in turn, then the aliases, and withdraws its claim. A
   rollback writes the alias first.

A promotion that was killed leaves its claim, which counts for STALE_SECONDS, or stops between the writes of 4: the
alias `@champion` then counts, and the next promotion repairs the rest from it. By the order in 4, the alias's version
is in the tag, and versions behind it there are not champions (yet, or any more).
"""

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from fulllora_dist.core.errors import UserError
from fulllora_dist.registry.mlflow_client import StoreError
from fulllora_dist.registry.promotion import Rules, Verdict, judge
from fulllora_dist.registry.registry import CHAMPION, PREVIOUS, Registry, Version
from fulllora_dist.registry.version_tags import MAX_TAG

STALE_SECONDS = 300.0
"""Age at which a claim belongs to a promotion that was killed."""
_CLAIM = "promotion."
_HISTORY = "champions"
_MAX_HISTORY = 100
_POLL_SECONDS = 0.2


class LostRace(UserError):
    """Another promotion came first; the champion was not moved."""


@dataclass(frozen=True)
class Outcome:
    """The result of a promotion.

    Attributes:
        outcome: "promoted", "refused" by the gate, or "kept": it is the champion already.
        version: the candidate.
        champion: number of the champion now, None where there is none.
        previous: number of the one before.
        verdict: the gate's.
        forced: the reason given to overrule it.
    """

    outcome: Literal["promoted", "refused", "kept"]
    version: Version
    champion: int | None
    previous: int | None
    verdict: Verdict
    forced: str | None = None


def promote(registry: Registry, reference: str, rules: Rules, force: str | None = None) -> Outcome:
    """Make a version the champion if it passes the gate, or if somebody gives a reason to overrule it.

    Args:
        reference: NAME/NUMBER or NAME@ALIAS.
        force: a reason; it is kept with the version, beside the gate's.

    Raises:
        LostRace: another promotion came first.
        UserError: no such version, an adapter that cannot be read, an empty reason.
    """
    if force is not None and not force.strip():
        raise UserError("--force needs a reason, which is kept with the version")
    candidate = registry.find(reference)
    aliases = registry.aliases(candidate.name)
    before = aliases.get(CHAMPION)
    verdict = check(registry, candidate, before, rules)
    if candidate.number == before or (not verdict.passed and force is None):
        outcome: Literal["kept", "refused"] = "kept" if candidate.number == before else "refused"
        return Outcome(outcome, candidate, before, aliases.get(PREVIOUS), verdict)
    registry.check(candidate)
    store, number = registry.store, str(candidate.number)
    with _turn(registry, candidate.name, f"version {number}") as turn:
        history = turn.champions()
        if (history[-1] if history else None) != before:
            raise LostRace(
                f"{candidate.name}: version {history[-1] if history else 'none'} became @{CHAMPION} while version "
                f"{number} was judged against {f'version {before}' if before else 'none'}; promote it again"
            )
        gate = "passed: " + "; ".join(verdict.findings) if verdict.passed else "; ".join(verdict.reasons)
        tags = {"promoted_at": _now(), "promoted_over": str(before or "none"), "gate": gate[:MAX_TAG]}
        if not verdict.passed and force is not None:
            tags["forced"] = force[:MAX_TAG]
        for key, value in tags.items():
            store.set_model_version_tag(candidate.name, number, key, value)
        turn.set([*history, candidate.number])
    return Outcome("promoted", candidate, candidate.number, before, verdict, None if verdict.passed else force)


def check(registry: Registry, candidate: Version, champion: int | None, rules: Rules) -> Verdict:
    """The gate's verdict; moves nothing."""
    first = champion in (None, candidate.number)
    theirs = None if first else registry.evaluation(registry.find(f"{candidate.name}/{champion}"))
    threat = registry.model(candidate.name).tags.get("threat")
    return judge(registry.evaluation(candidate), theirs, rules, first=first, threat=threat)


def rollback(registry: Registry, name: str, reason: str | None = None) -> tuple[int, int]:
    """Make `@previous` the champion again; returns (the champion now, the one before).

    Raises:
        LostRace: a promotion is under way.
        UserError: there is no champion before this one, or it was deleted.
    """
    with _turn(registry, name, "a rollback") as turn:
        history = turn.champions()
        if len(history) < 2:
            raise UserError(
                f"{name}: no version was @{CHAMPION} before {f'version {history[0]}' if history else 'one'}"
            )
        left = history.pop()
        registry.find(f"{name}/{history[-1]}")  # refuses one that was deleted, before anything is written
        note = f"{_now()} {reason or ''}".strip()[:MAX_TAG]
        registry.store.set_model_version_tag(name, str(left), "rolled_back", note)
        turn.set(history, back=True)
    return history[-1], left


class _Turn:
    """The right to move the aliases of one registered model, for the time of `_turn`."""

    def __init__(self, registry: Registry, name: str, claim: str):
        self._registry, self._name, self._claim = registry, name, claim
        self._deadline = time.monotonic() + STALE_SECONDS / 2

    def champions(self) -> list[int]:
        """Numbers of all champions, the present one last. Where the tag and `@champion` differ, the alias counts: a
        promotion or rollback was killed between the two, or somebody moved it by hand."""
        model = self._registry.model(self._name)
        if CHAMPION not in model.aliases:
            return []
        present = int(model.aliases[CHAMPION])
        history: list[int] = json.loads(model.tags.get(_HISTORY, "[]"))
        if present not in history:
            return [*history, present]
        while history[-1] != present:
            history.pop()
        return history

    def set(self, champions: list[int], back: bool = False) -> None:
        """Write history and aliases; `back`: of a rollback."""
        store, name = self._registry.store, self._name
        if time.monotonic() > self._deadline or self._claim not in self._registry.model(name).tags:
            raise LostRace(f"{name}: the store was too slow, the turn is over; @{CHAMPION} was not moved, try again")
        if back:
            store.set_registered_model_alias(name, CHAMPION, str(champions[-1]))
        store.set_registered_model_tag(name, _HISTORY, json.dumps(champions[-_MAX_HISTORY:]))
        if not back:
            store.set_registered_model_alias(name, CHAMPION, str(champions[-1]))
        if len(champions) > 1:
            store.set_registered_model_alias(name, PREVIOUS, str(champions[-2]))
        elif PREVIOUS in self._registry.aliases(name):
            store.delete_registered_model_alias(name, PREVIOUS)


@contextmanager
def _turn(registry: Registry, name: str, what: str) -> Iterator[_Turn]:
    """Raises:
    LostRace: there is an earlier claim, or later ones are not withdrawn.
    """
    registry.model(name)  # refuses an unknown name
    store = registry.store
    claim = f"{_CLAIM}{time.time_ns():020d}-{secrets.token_hex(4)}"  # in the order of time, mostly
    store.set_registered_model_tag(name, claim, f"{what} by process {os.getpid()} on {socket.gethostname()}")
    try:
        deadline = time.monotonic() + STALE_SECONDS / 4
        while others := _claims(registry, name, claim):
            earliest = min(others)
            if earliest < claim or time.monotonic() > deadline:
                raise LostRace(
                    f"{name}: another promotion is under way ({others[earliest]}); @{CHAMPION} was not moved, try again"
                )
            time.sleep(_POLL_SECONDS)
        yield _Turn(registry, name, claim)
    finally:
        try:
            store.delete_registered_model_tag(name, claim)
        except StoreError as error:  # what was done is done
            blocked = f"promotions of {name} are blocked for {STALE_SECONDS / 60:.0f} minutes"
            print(f"warning: {error}: {blocked}", file=sys.stderr)


def _claims(registry: Registry, name: str, own: str) -> dict[str, str]:
    """The others' claims. Stale ones are removed."""
    claims = {key: value for key, value in registry.model(name).tags.items() if key.startswith(_CLAIM) and key != own}
    for key in list(claims):
        begun = int(key.removeprefix(_CLAIM).partition("-")[0]) / 1e9
        if abs(time.time() - begun) > STALE_SECONDS:
            registry.store.delete_registered_model_tag(name, key)
            del claims[key]
    return claims


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
