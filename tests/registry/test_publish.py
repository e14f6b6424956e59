"""An adapter becomes one version of one registered model, and comes out again as it went in."""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.registry.publish import publish
from fulllora_dist.registry.registry import Registry, Version, data_name
from fulllora_dist.registry.version_tags import Lineage
from tests.registry.conftest import TRAINING, evaluation, right
from tests.tiny import images


def test_published_once_and_loaded_as_it_was(
    registry: Registry, adapter: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    folder = adapter()
    run = registry.store.create_run(registry.store.experiment_id("trained")).info.run_id
    lineage = Lineage(run, "optim: {lr: 0.001}\n", "c0ffee")
    first = publish(registry, folder, evaluation=evaluation(right(120)), lineage=lineage)
    again = publish(registry, folder, evaluation=evaluation(right(120)), lineage=lineage)
    assert again == first
    (only,) = registry.versions(first.name)
    assert only == first
    assert first.name.startswith("vit_tiny_patch16_224_")
    assert first.name.endswith("-digits-linf-8_255")
    assert first.run_id == run
    description = json.loads(Path(folder, "adapter.json").read_text())
    expected = {
        "adapter_sha256": description["sha256"],
        "git_commit": "c0ffee",
        "data_digest": "0f" * 32,
        "method": "pgd",
        "n": "200",
        "norm": "linf",
        "attacks": "clean,pgd20",
        "warnings": "none",
        "accuracy.pgd20": "0.6000 0.5308 0.6654",  # Wilson's interval of 120 of 200
    }
    assert expected.items() <= first.tags.items()
    assert registry.evaluation(first) == evaluation(right(120))
    (logged,) = registry.store.search_logged_models([registry.store.experiment_id("trained")])
    assert logged.source_run_id == run
    fetched = registry.fetch(first.address, str(tmp_path / "fetched"))
    assert {"MLmodel", "README.md", "requirements.txt", "config.yaml"} <= set(os.listdir(fetched))
    for file in ("adapter.json", "adapter.safetensors"):
        assert Path(fetched, file).read_bytes() == Path(folder, file).read_bytes()
    x = images()
    expected_logits = fd.load(folder)(x)
    for address in (first.address, first.source, f"runs:/{run}/adapter"):
        assert torch.equal(fd.load(address)(x), expected_logits), address


def test_another_evaluation_of_the_same_adapter(registry: Registry, adapter: Callable[..., str]) -> None:
    folder = adapter(seed=2)
    bare = publish(registry, folder)
    assert registry.evaluation(bare) is None
    for n in (100, 110):
        version = publish(registry, folder, evaluation=evaluation(right(n)))
        assert version.number == bare.number
        assert registry.evaluation(version) == evaluation(right(n))
        assert version.tags["accuracy.pgd20"].startswith(f"{n / 200:.4f} ")


def test_an_attack_whose_name_no_tag_can_have(sqlite: str, adapter: Callable[..., str]) -> None:
    found = evaluation(right(90))
    found["attacks"]["apgd-ce+square"] = found["attacks"].pop("pgd20")
    version = publish(Registry(sqlite, create=True), adapter(seed=3), evaluation=found)
    assert version.tags["attacks"] == "clean,apgd-ce+square"
    assert {attack: share for attack, (share, *_) in version.accuracies.items()} == {"clean": 1, "apgd-ce+square": 0.45}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("s3://bucket/imagenet/train", "imagenet"),
        ("s3://imagenet/train", "imagenet"),
        ("https://h/b/imagenet/train?X-Amz-Signature=dead", "imagenet"),
        ("https://h/b/imagenet/train?sig=a/b", "imagenet"),
        ("HTTPS://h/train", "data"),
        ("data/digits/shards", "digits"),
        ("/data/why?not/train", "why?not"),
    ],
)
def test_the_name_of_a_data_set(where: str, name: str) -> None:
    assert data_name(where) == name


def _fork(work: Callable[[], object]) -> int:
    """Do it in a process of its own; returns how that ended, minus the signal's number where one ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Dying:
    """A store on which a process kills itself: before its n-th call, or when the answer has come."""

    def __init__(self, store: Any, calls: int, answered: bool):
        self._store, self._left, self._answered = store, calls, answered

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if not callable(call):
            return call

        def counted(*args: Any, **settings: Any) -> Any:
            self._left -= 1
            if self._left < 0 and not self._answered:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = call(*args, **settings)
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return counted


CALLS = 20  # of publishing an adapter with its evaluation: beyond them nothing is killed


def of_attack(n: int, attack: str, **metadata: Any) -> dict[str, Any]:
    """An evaluation under that attack."""
    found = evaluation(right(n), **metadata)
    found["attacks"][attack] = found["attacks"].pop("pgd20")
    return found


def check_tags(version: Version, found: dict[str, Any]) -> None:
    """They are those of this evaluation, and no others."""
    assert set(version.accuracies) == set(found["attacks"])
    assert sum(tag.startswith("accuracy.") for tag in version.tags) == len(found["attacks"])
    assert version.tags.get("evaluation_data") == found.get("data")


def test_twenty_crashes_leave_one_version(server: str, adapter: Callable[..., str]) -> None:
    """Each at a random point of publishing another adapter, some twice, some in place of an evaluation that is there;
    then the same command again."""
    registry, rng = Registry(server), random.Random(0)
    experiment = registry.store.experiment_id("adapters")
    run = registry.store.create_run(experiment).info.run_id
    lineage = Lineage(run)
    crashes, seed, name = 0, 100, "crashes"
    while crashes < 20:
        folder, seed = adapter(seed=seed), seed + 1
        found = of_attack(seed - 50, "cw20")
        if rng.random() < 0.3:
            publish(registry, folder, evaluation=evaluation(right(1)), name=name, lineage=lineage)
        for _ in range(rng.choice((1, 1, 2))):
            calls, answered = rng.randrange(CALLS), rng.random() < 0.5

            def attempt(
                calls: int = calls, answered: bool = answered, folder: str = folder, found: Any = found
            ) -> None:
                own = Registry(server)
                own.store = _Dying(own.store, calls, answered)
                publish(own, folder, evaluation=found, name=name, lineage=lineage)

            code = _fork(attempt)
            assert code in (0, -signal.SIGKILL)
            crashes += code != 0
        version = publish(registry, folder, evaluation=found, name=name, lineage=lineage)
        sha256 = version.tags["adapter_sha256"]
        same = [other for other in registry.versions(name) if other.tags["adapter_sha256"] == sha256]
        assert same == [version]
        assert registry.evaluation(version) == found
        check_tags(version, found)
        registry.check(version)
        logged = registry.store.search_logged_models([experiment], filter_string=f"tags.adapter_sha256 = '{sha256}'")
        assert [str(model.status) for model in logged] == ["READY"]
        outputs = [output.model_id for output in registry.store.get_run(run).outputs.model_outputs]
        assert outputs.count(logged[0].model_id) == 1
    assert len(registry.versions(name)) == seed - 100


class _Stopped(BaseException):
    pass


@contextmanager
def stopped_at(store: Any, name: str, call: int = 0) -> Iterator[None]:
    """The store's n-th call of that name stops whoever makes it."""
    whole, left = getattr(store, name), iter(range(call, -1, -1))

    def stopping(*args: Any, **settings: Any) -> Any:
        if not next(left):
            raise _Stopped
        return whole(*args, **settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, name, stopping, raising=False)
        with pytest.raises(_Stopped):
            yield


def test_stopped_while_the_evaluation_changes(sqlite: str, adapter: Callable[..., str]) -> None:
    """The tags of the old one are gone before the new one is the version's."""
    registry, folder = Registry(sqlite, create=True), adapter(seed=20)
    found = of_attack(100, "cw20", data=None)
    for call in range(2):  # accuracy.pgd20 and evaluation_data
        publish(registry, folder, evaluation=evaluation(right(99)), name="stopped")
        with stopped_at(registry.store, "delete_model_version_tag", call):
            publish(registry, folder, evaluation=found, name="stopped")
        check_tags(publish(registry, folder, evaluation=found, name="stopped"), found)


def test_stopped_before_the_model_is_its_run_s(sqlite: str, adapter: Callable[..., str]) -> None:
    registry, folder = Registry(sqlite, create=True), adapter(seed=21)
    run = registry.store.create_run(registry.store.experiment_id("linked")).info.run_id
    with stopped_at(registry.store, "log_outputs"):
        publish(registry, folder, name="linked", lineage=Lineage(run))
    version = publish(registry, folder, name="linked", lineage=Lineage(run))
    (output,) = registry.store.get_run(run).outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"


def test_published_by_several_at_once(registry: Registry, adapter: Callable[..., str]) -> None:
    folder, start = adapter(seed=7), threading.Barrier(4)

    def one(_: int) -> Version:
        start.wait()
        return publish(registry, folder, evaluation=evaluation(right(90)), name="at-once")

    with ThreadPoolExecutor(4) as threads:
        numbers = {version.number for version in threads.map(one, range(4))}
    (only,) = registry.versions("at-once")
    assert numbers == {only.number}
    registry.check(only)


REFUSED: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "a damaged adapter": (
        lambda folder: Path(folder, "adapter.safetensors").write_bytes(b"x") and {},
        "adapter.safetensors is damaged: its sha256 does not match adapter.json",
    ),
    "no adapter": (lambda folder: Path(folder, "adapter.json").unlink() or {}, "has no adapter.json"),
    "a NaN metric": (
        lambda folder: {"evaluation": _with_accuracy(float("nan"))},
        r"evaluation.json: pgd20 at eps 0.03137 has accuracy nan .* 100 of 200 images are correct; evaluate again",
    ),
    "another backbone's evaluation": (
        lambda folder: {"evaluation": evaluation(right(9), backbone="vit_large")},
        "evaluation.json is of the backbone vit_large, the adapter's is vit_tiny_patch16_224",
    ),
    "another adapter's evaluation": (
        lambda folder: {"evaluation": evaluation(right(9), adapter_sha256="c0ffee" * 10)},
        "evaluation.json is of the adapter c0ffeec0ffee, this one is",
    ),
    "the bare backbone's evaluation": (
        lambda folder: {"evaluation": evaluation(right(9), adapter_sha256=None)},
        "evaluation.json is of no adapter, this one is",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, sqlite: str, adapter: Callable[..., str]) -> None:
    registry, folder = Registry(sqlite, create=True), adapter()
    settings, words = REFUSED[case]
    given = settings(folder)
    with pytest.raises(UserError, match=words) as caught:
        publish(registry, folder, name="refused", **given)
    assert "\n" not in str(caught.value)
    assert "refused" not in registry.names()


def _with_accuracy(value: float) -> dict[str, Any]:
    found = evaluation(right(100))
    found["attacks"]["pgd20"]["accuracy"] = value
    return found


def test_a_model_is_of_one_backbone_and_threat(sqlite: str, adapter: Callable[..., str]) -> None:
    registry = Registry(sqlite, create=True)
    publish(registry, adapter(), name="one-kind")
    another = TRAINING | {"threat": {"norm": "linf", "eps": 4 / 255}}
    with pytest.raises(
        UserError, match=r"one-kind is of another threat \(linf eps = 8/255, the adapter's is linf eps = 4"
    ):
        publish(registry, adapter(seed=1, training=another), name="one-kind")
    with pytest.raises(UserError, match="one-kind is of another backbone"):
        publish(registry, adapter(seed=0, family="swin"), name="one-kind")
    other_data = TRAINING | {"data": TRAINING["data"] | {"name": "letters"}}
    with pytest.raises(UserError, match=r"of another data \(digits, the adapter's is letters\).*or give --data"):
        publish(registry, adapter(seed=2, training=other_data), name="one-kind")
    assert publish(registry, adapter(seed=2, training=other_data), name="one-kind", data="digits").number == 2
    with pytest.raises(UserError, match="does not record which data it was trained on; give --data NAME"):
        publish(registry, adapter(training={"threat": TRAINING["threat"]}))
    assert publish(registry, adapter(training={}), evaluation=evaluation(right(1)), data="bees").name.endswith(
        "-bees-linf-8_255"
    )


UNKNOWN = {
    "one-alias@nobody": r"one-alias has no alias nobody; it has no alias, versions 1$",
    "one-alias/7": "one-alias has no version 7; it has versions 1$",
    "nothing@champion": "there is no registered model nothing; there are: .*one-alias",
    "one-alias": "'models:/one-alias' is not a version; write NAME@champion or NAME/3",
}


def test_what_there_is_not(sqlite: str, adapter: Callable[..., str]) -> None:
    registry = Registry(sqlite, create=True)
    publish(registry, adapter(), name="one-alias")
    for reference, words in UNKNOWN.items():
        with pytest.raises(UserError, match=words):
            fd.load(f"models:/{reference}")
    with pytest.raises(UserError, match=r"there is no MLflow store .*nowhere.db; set MLFLOW_TRACKING_URI"):
        Registry("sqlite:///nowhere.db")


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "sqlite:///{}/no.db", "sqlite:///{}/no.db/mlflow.db", "foo://bar", "file:{}"]
)
def test_what_is_no_store(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "no.db").write_text("a note, " * 1000)
    with pytest.raises(UserError, match=r"^MLflow at (http://127.0.0.1:9|sqlite:|foo:|file:)") as caught:
        Registry(uri.format(tmp_path), create=True)
    assert "\n" not in str(caught.value)


def test_two_that_make_an_experiment_at_once(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Registry(sqlite, create=True).store, Registry(sqlite).store
    get = one.get_experiment_by_name

    def late(name: str) -> Any:
        monkeypatch.undo()
        found = get(name)
        other.experiment_id(name)
        return found

    monkeypatch.setattr(one, "get_experiment_by_name", late, raising=False)
    assert one.experiment_id("both") == other.experiment_id("both")


def test_an_artifact_that_changed(sqlite: str, adapter: Callable[..., str]) -> None:
    """In the store, behind the registry's back."""
    registry = Registry(sqlite, create=True)
    version = publish(registry, adapter(seed=50), name="changed", evaluation=evaluation(right(100)))
    where = Path(registry.store.get_model_version_download_uri("changed", "1").removeprefix("file://"))
    (file,) = (where / "evaluations").iterdir()
    file.write_bytes(file.read_bytes().replace(b"0.5", b"0.9"))
    with pytest.raises(UserError, match=r"evaluations/\w+.json is damaged: its sha256"):
        registry.evaluation(version)
    other = Path(adapter(seed=51))
    for name in ("adapter.json", "adapter.safetensors"):
        (where / name).write_bytes((other / name).read_bytes())
    with pytest.raises(UserError, match="models:/changed/1 is not the one that was published"):
        fd.load("models:/changed/1")
    (where / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter: models:/changed/1/adapter.safetensors is damaged"):
        fd.load("models:/changed/1")
