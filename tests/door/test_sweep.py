"""What a new user's own mistakes brought to light where the parts meet, a section a kind."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import sqlalchemy
import torch
from PIL import Image

import fulllora_dist as fd
from fulllora_dist.commands.sync import sync
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.failures import exit_answer
from fulllora_dist.evaluation.compare import compare
from fulllora_dist.evaluation.report import read_evaluation
from fulllora_dist.registry.registry import Registry
from fulllora_dist.tracking.outbox import FOLDER as OUTBOX
from fulllora_dist.tracking.settings import check_uri
from tests.door.runs import EVALUATE, TRAIN, make_config, make_shards_of
from tests.ranks import RankServer
from tests.registry.conftest import evaluation
from tests.tiny import images, tiny

MAKE, INDEX, COMPARE, ADAPTERS = (
    f"tools/{name}.py" for name in ("make_shards", "index_shards", "compare_evaluations", "adapters")
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml with its shards/ of three classes, and adapter/ of an untrained model of the config's size."""
    folder = tmp_path_factory.mktemp("place")
    make_config(folder)
    fd.save_adapter(tiny(num_classes=3), str(folder / "adapter"))
    return folder


# ---- predict and the files of tools


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two images, one of them in a folder, and five files that are none of the user's images."""
    folder = tmp_path / "pictures"
    for name in ("a.png", "sub/b.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "._a.png", "c.tiff"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), len(name), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_predict_passes_over_what_tools_leave(
    rank_server: RankServer, place: Path, pictures: Path, tmp_path: Path, ending: str
) -> None:
    output = tmp_path / f"predictions.{ending}"
    done = rank_server.launch(ROOT / ADAPTERS, "predict", place / "adapter", pictures, "--output", output).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        f"{output}: 2 images, 2 of them new",
        "passed over 5 other files (jpg, jpeg, png, webp are read, hidden ones are not)",
    ]
    lines = output.read_text().splitlines()
    if ending == "csv":
        assert [line.split(",")[0] for line in lines] == ["picture", "a.png", "sub/b.png"]
    else:
        assert [json.loads(line)["picture"] for line in lines] == ["a.png", "sub/b.png"]


@pytest.mark.parametrize("source", ["gone", "pictures/notes.txt", "pictures/.ipynb_checkpoints/gone"])
def test_a_refused_predict_makes_no_folder(
    refused: Callable[..., str], place: Path, pictures: Path, tmp_path: Path, source: str
) -> None:
    path = tmp_path / source
    said = refused(ADAPTERS, "predict", place / "adapter", path, "--output", tmp_path / "new/p.csv", keep=(tmp_path,))
    assert said == (
        f"error: {path} holds no images (jpg, jpeg, png, webp) and no shards: {path}/index.safetensors: no index "
        "there; fulllora shards writes one from images, fulllora index from shards"
    )


# ---- where an adapter is saved and looked for


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("", "must be a folder or URL, got ''"),
        (None, "must be a folder or URL, got None"),
        (3, "must be a folder or URL, got 3"),
        ("foo://x/y", "foo://x/y: Protocol not known: foo"),
        (
            "s3://me:secret@x/y",
            "s3://***@x/y: a URL must not hold user:password@; credentials belong in the environment or "
            "~/.config/fsspec (docs/data.md)",
        ),
    ],
)
def test_what_is_no_folder_is_refused(
    unchanged: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Any, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny()
    with unchanged(tmp_path):
        for call, whose in (
            (lambda: fd.save_adapter(model, folder), "save_adapter"),
            (lambda: fd.load(folder), "adapter"),
        ):
            with pytest.raises(UserError) as error:
                call()
            assert str(error.value) == (line if "secret" in str(folder) else f"{whose}: {line}")


@pytest.mark.parametrize(
    ("inside", "reason"), [("", "File exists"), ("x", "Not a directory"), ("x/y", "Not a directory")]
)
def test_an_adapter_is_not_saved_over_a_file(unchanged: Callable, tmp_path: Path, inside: str, reason: str) -> None:
    (tmp_path / "file").write_text("mine")
    folder = str(tmp_path / "file" / inside)
    with unchanged(tmp_path), pytest.raises(UserError) as error:
        fd.save_adapter(tiny(), folder)
    assert str(error.value) == f"save_adapter: {folder}: cannot be written ({reason})"


def test_a_path_is_as_good_as_a_string(tmp_path: Path) -> None:
    model = tiny()
    fd.save_adapter(model, tmp_path / "adapter")  # type: ignore[arg-type]
    again = fd.load(tmp_path / "adapter")  # type: ignore[arg-type]
    assert torch.equal(again(images()), model(images()))


def test_an_address_that_is_almost_right_is_told_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fd.save_adapter(tiny(), "run/adapter")
    for address, remedy in (
        ("run", "did you mean run/adapter?"),
        ("bees@champion", "for MLflow's registry write models:/bees@champion"),
        ("bees", "give a folder that save_adapter wrote"),
    ):
        with pytest.raises(UserError) as error:
            fd.load(address)
        assert str(error.value) == f"adapter: {address} has no adapter.json; {remedy}"
    Path("run").rename("run@home")
    with pytest.raises(UserError, match=r"did you mean run@home/adapter\?$"):
        fd.load("run@home")


def test_an_adapter_of_another_model_than_the_config_s_is_not_counted(
    refused: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    given = ["--config", place / "config.yaml", "--adapter", place / "adapter", "model.backbone=vit_small_patch16_224"]
    assert refused(EVALUATE, *given, "--dry-run", keep=(tmp_path,)) == (
        f"error: model.backbone: must be vit_tiny_patch16_224 for the adapter {place}/adapter, got "
        "vit_small_patch16_224; use the config that it was trained with"
    )


# ---- a command line that argparse refuses


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (MAKE, "", "the following arguments are required: SRC, DST; make_shards.py"),
        (MAKE, "a b --image-size 3.5", "--image-size: invalid int value: '3.5'; make_shards.py"),
        (MAKE, "a b --holdout 10%", "--holdout: invalid float value: '10%'; make_shards.py"),
        (INDEX, "a --imagefield x", "unrecognized arguments: --imagefield x; index_shards.py"),
        (COMPARE, "a.json", "the following arguments are required: B; compare_evaluations.py"),
        (ADAPTERS, "lst", "COMMAND: invalid choice: 'lst' (choose from 'list', 'show', 'diff', 'publish', 'promote', "
                          "'rollback', 'pull', 'export', 'predict'); adapters.py"),
        ("tools/benchmark.py", "several --round 3.5", "--rounds: invalid int value: '3.5'; benchmark.py several"),
        ("tools/backbones.py", "--jsn", "unrecognized arguments: --jsn; backbones.py"),
        (ADAPTERS, "predict m@x pictures", "the following arguments are required: --output; adapters.py predict"),
        (EVALUATE, "--num-samples 3", "the following arguments are required: --config; evaluate.py"),
        (TRAIN, "--config", "--config: expected one argument; train.py"),
        (TRAIN, "--config c.yaml --optim.lr 3", "unrecognized arguments: --optim.lr; settings are key=value: "
                                                "optim.lr=VALUE; train.py"),
        (EVALUATE, "--config c.yaml --optim.lr=3", "unrecognized arguments: --optim.lr=3; settings are key=value: "
                                                   "optim.lr=3; evaluate.py"),
        ("jobs/launch.py", "logs --lines many x", "--lines: invalid int value: 'many'; launch.py logs"),
    ],
)  # fmt: skip
def test_the_usage_is_not_printed(
    refused: Callable[..., str], tmp_path: Path, script: str, arguments: str, line: str
) -> None:
    assert (
        refused(script, *arguments.split(), keep=(tmp_path,), cwd=tmp_path)
        == f"error: {line} --help lists the arguments"
    )


# ---- disks and paths that fail


def _raised(path: Path | str, mode: str = "r") -> OSError:
    """What opening and filling the file raises."""
    try:
        with open(path, mode) as file:
            file.write("x" * 100_000)
    except OSError as error:
        return error
    raise AssertionError(f"{path} can be written")


def test_a_full_disk_is_one_line() -> None:
    assert exit_answer(_raised("/dev/full", "w")) == (
        "error: No space left on device; free space and re-run the same command",
        1,
    )
    named = OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x.tar")
    assert exit_answer(named) == ("error: /data/x.tar: Disk quota exceeded; free space and re-run the same command", 1)


def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in (
        (tmp_path / "file/x", "Not a directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert exit_answer(_raised(path)) == (f"error: {path}: {reason}", 2)
    assert exit_answer(OSError(errno.EBADF, "Bad file descriptor")) is None  # a mistake of ours


@pytest.mark.parametrize("command", ["pull m/1 {}"])
def test_pull_does_not_write_over_a_file(
    refused: Callable[..., str], database: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    uri = ["--uri", f"sqlite:///{shutil.copy(database, tmp_path / 'mlflow.db')}"]
    said = refused(ADAPTERS, *command.format(tmp_path / "file").split(), *uri, keep=(tmp_path,))
    assert said == f"error: {tmp_path / 'file'} is no folder; choose another one"


# ---- class names beside shards


def test_indexing_our_own_shards_again_keeps_their_names(rank_server: RankServer, tmp_path: Path) -> None:
    folder = make_shards_of(tmp_path)
    made = (folder / "index.safetensors").read_bytes()
    index_shards([str(folder)], progress=False)
    assert (folder / "index.safetensors").read_bytes() == made
    (folder / "index.safetensors").unlink()
    assert rank_server.launch(ROOT / INDEX, folder).wait().returncode == 0
    assert (folder / "index.safetensors").read_bytes() == made
    index_shards([str(folder)], classes=["x", "y", "z"], progress=False)  # a choice of one's own
    assert fd.evaluate(tiny(num_classes=3), folder, attacks=("clean",))["class_match"] != ""


@pytest.mark.parametrize("names", ["class1,class0,class2", "class2,class1,class0"])
def test_their_names_in_another_order_are_refused(refused: Callable[..., str], place: Path, names: str) -> None:
    line = "--classes: classes.txt beside the shards has these names in another order; leave --classes out"
    assert refused(INDEX, place / "shards", "--classes", names, keep=(place,)) == f"error: {line}"
    with pytest.raises(UserError) as error:
        index_shards([str(place / "shards")], classes=names.split(","), progress=False)
    assert str(error.value) == line


# ---- bad input that every rank sees


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda folder: (folder / "adapter.safetensors").unlink(),
            "{} has no adapter.safetensors; give a folder that save_adapter wrote",
        ),
        (
            lambda folder: (folder / "adapter.safetensors").write_bytes(b"x"),
            "{}/adapter.safetensors is damaged: its sha256 does not match adapter.json",
        ),
        (
            lambda folder: (folder / "adapter.json").write_text("{"),
            "{}/adapter.json is damaged; it must be JSON written by save_adapter",
        ),
    ],
)
@pytest.mark.parametrize("script", [EVALUATE, TRAIN])
def test_two_ranks_say_it_once(
    refused: Callable[..., str], place: Path, tmp_path: Path, script: str, damage: Callable[[Path], Any], line: str
) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    damage(adapter)
    given = {
        EVALUATE: ["--adapter", adapter],
        TRAIN: [f"adapter.init_from={adapter}", f"run.output_dir={tmp_path}/run"],
    }
    said = refused(
        script, "--config", place / "config.yaml", *given[script], "adapter.rank=3", ranks=2, keep=(tmp_path,)
    )
    assert said == f"error: adapter: {line.format(adapter)}"


def _said_by(comm: Comm, failing: list[int]) -> str | None:
    """What a rank raises where these ranks meet bad input; None where it raises nothing."""

    def work() -> int:
        if comm.rank in failing:
            raise UserError(f"no file at rank {comm.rank}")
        return comm.rank

    try:
        assert comm.run_on_all(work) == comm.rank
    except SharedUserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("failing", "line"),
    [
        ([], None),
        ([0], "no file at rank 0"),
        ([1], "on rank 1: no file at rank 1"),
        ([0, 1], "no file at rank 0"),
    ],
)
def test_all_ranks_end_where_one_meets_bad_input(rank_server: RankServer, failing: list[int], line: str | None) -> None:
    assert rank_server.run(2, _said_by, failing) == [line, line]


# ---- evaluation.json


@pytest.fixture
def report() -> dict[str, Any]:
    return dict(evaluation((np.arange(8) % 4 == 0).astype(int), (np.arange(8) % 2 == 0).astype(int)))  # type: ignore[arg-type]


def _twice(report: dict[str, Any]) -> None:
    (name,) = report["attacks"].keys() - {"clean"}
    again = report["attacks"][name] | {"correct": [0] * len(report["ids"])}
    report["more_eps"] = [{"eps": report["eps"], "attacks": {name: again}}]


def _all_wrong(report: dict[str, Any]) -> None:
    report["attacks"]["clean"]["correct"] = [0] * len(report["ids"])


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (_twice, "{}: pgd20 at 8/255 stands there twice; evaluate again"),
        (_all_wrong, "{}: 2 images are right under pgd20 at 8/255 but wrong without an attack; evaluate again"),
        (lambda r: r.update(eps=float("nan")), "{} is not an evaluation.json; evaluate.py --output writes one"),
        (lambda r: r.update(norm="L2"), "{} is not an evaluation.json; evaluate.py --output writes one"),
        (lambda r: r.update(pictures=None), "{} is not an evaluation.json; evaluate.py --output writes one"),
    ],
)
def test_an_edited_evaluation_is_refused(
    refused: Callable[..., str], tmp_path: Path, report: dict[str, Any], edit: Callable[[Any], None], line: str
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(report))
    assert compare(read_evaluation(good), read_evaluation(good))["rows"][0]["difference"] == 0
    edit(report)
    bad.write_text(json.dumps(report))
    assert refused(COMPARE, bad, good, keep=(tmp_path,)) == f"error: {line.format(bad)}"
    with pytest.raises(UserError) as error:
        read_evaluation(bad)
    assert str(error.value) == line.format(bad)


# ---- MLflow's address


ANY = "http(s)://HOST[:PORT], sqlite:///FILE or databricks"
SLASHES = "with a fourth slash where the path is absolute"
SERVER = "or http://HOST of a server"
NO_ADDRESSES = {
    "htps://mlflow.lab": ANY,
    "sqllite:///mlflow.db": ANY,
    "foo://x": ANY,
    "s3://bucket/mlruns": ANY,
    "http://": ANY,
    "databricks-uc": f"sqlite:///databricks-uc/mlflow.db, {SERVER}",
    "mlflow:5000": "http://mlflow:5000",
    "10.0.0.1:5000/lab": "http://10.0.0.1:5000/lab",
    "http//mlflow:5000": "http://mlflow:5000",
    "https:/mlflow": "https://mlflow",
    "http:mlflow:5000": "http://mlflow:5000",
    "sqlite://runs/mlflow.db": f"sqlite:///runs/mlflow.db, {SLASHES}",
    "sqlite:mlflow.db": f"sqlite:///mlflow.db, {SLASHES}",
    "mlflow.db": f"sqlite:///mlflow.db, {SERVER}",
    "/data/mlruns/": f"sqlite:////data/mlruns/mlflow.db, {SERVER}",
    "file:///data/mlruns": f"sqlite:////data/mlruns/mlflow.db, {SERVER}",
}
ADDRESSES = (
    "http://mlflow:5000", "HTTPS://mlflow.lab/a?b=c", "sqlite:///mlflow.db", "sqlite:////data/mlflow.db",
    "sqlite+pysqlite:///mlflow.db", "mysql+pymysql://user:word@host/db", "postgresql://host/db", "mssql+pyodbc://host/db",
    "databricks", "databricks://profile",
)  # fmt: skip


@pytest.mark.parametrize("uri", NO_ADDRESSES)
def test_the_right_spelling_of_mlflow_s_address(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow itself opens none of them; of http it only notices with the first request."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    if not uri.startswith(("http:", "https:")):
        with pytest.raises((mlflow.MlflowException, sqlalchemy.exc.ArgumentError)):
            mlflow.MlflowClient(uri)
    line = f"MLflow cannot open {uri}; write {NO_ADDRESSES[uri]}"
    with pytest.raises(UserError) as error:
        check_uri(uri)
    assert str(error.value) == f"tracking.uri: {line}"
    with pytest.raises(UserError) as error:
        Registry(uri)
    assert str(error.value) == f"MLflow at {uri}: {line}"


def test_addresses_that_mlflow_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ADDRESSES:
        check_uri(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for uri in ("mlruns", "file:///data/mlruns"):
        check_uri(uri)
    with pytest.raises(UserError, match=r"^tracking\.uri: MLflow cannot open \*\*\*@mlflow:5000; write http"):
        check_uri("user:word@mlflow:5000")


def test_sync_tracking_refuses_such_an_address(
    unchanged: Callable[..., AbstractContextManager[None]],
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(str(place / "config.yaml"), [f"run.output_dir={tmp_path}/run", "tracking.enabled=true"])
    (tmp_path / "run" / OUTBOX).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlflow:5000")
    for uri, name in (("mlflow:5000", "--uri"), (None, "MLFLOW_TRACKING_URI")):
        with unchanged(tmp_path), pytest.raises(UserError) as error:
            sync(f"{tmp_path}/run", uri, 0, print)
        assert str(error.value) == f"{name}: MLflow cannot open mlflow:5000; write http://mlflow:5000"


@pytest.mark.parametrize("uri", ["htps://mlflow.lab", "sqllite:///mlflow.db", "foo://x", "s3://bucket/mlruns"])
@pytest.mark.parametrize("by", ["setting", "environment"])
def test_an_address_that_mlflow_does_not_know_is_refused(
    refused: Callable[..., str], place: Path, tmp_path: Path, uri: str, by: str
) -> None:
    settings = ["--config", place / "config.yaml", f"run.output_dir={tmp_path}/run", "tracking.enabled=true"]
    settings += [f"tracking.uri={uri}"] if by == "setting" else []
    said = refused(TRAIN, *settings, keep=(tmp_path,), env={**os.environ, "MLFLOW_TRACKING_URI": uri})
    assert said == (
        f"error: {'tracking.uri' if by == 'setting' else 'MLFLOW_TRACKING_URI'}: MLflow cannot open {uri}; write "
        "http(s)://HOST[:PORT], sqlite:///FILE or databricks"
    )


# ---- names of registered models


@pytest.mark.parametrize("name", ["m@champion", "a/b", "a:b", "m's", "m\n", "", " m", "m" * 201])
def test_a_model_gets_no_name_that_cannot_be_addressed(
    refused: Callable[..., str], database: Path, place: Path, tmp_path: Path, name: str
) -> None:
    store = Path(shutil.copy(database, tmp_path / "mlflow.db"))
    (tmp_path / "e.json").write_text(json.dumps(evaluation(np.ones(4, dtype=int))))
    line = (
        f"{name[:50]!r} is no name for a registered model; it must have 1 to 200 characters, none of them / : @, a "
        "quote or a control character, and no blank at an end"
    )
    publish = ["publish", place / "adapter", "--evaluation", tmp_path / "e.json", "--uri", f"sqlite:///{store}"]
    assert refused(ADAPTERS, *publish, "--name", name, keep=(tmp_path,)) == f"error: {line}"
    with pytest.raises(UserError) as error:
        load_config(str(place / "config.yaml"), [f"tracking.registered_model_name={json.dumps(name)}"])
    assert line in str(error.value)


# ---- from Python


@pytest.mark.parametrize("rank", [129, 10**6, 10**9])
def test_a_rank_beyond_the_widest_layer_is_refused_before_memory_is_taken(rank: int) -> None:
    with pytest.raises(UserError) as error:
        tiny(rank=rank)
    assert str(error.value) == f"adapter.rank: must be at most 128, the width of the widest layer, got {rank}"


@pytest.mark.parametrize("samples", [1.5, "5", 0, 49])
def test_a_number_of_images_is_a_number(place: Path, samples: Any) -> None:
    with pytest.raises(UserError) as error:
        fd.evaluate(tiny(num_classes=3), place / "shards", num_samples=samples)
    assert str(error.value) == (
        f"evaluation.num_samples must be between 1 and the 48 samples of {place}/shards, got {samples!r}"
    )


@pytest.mark.parametrize("attacks", [None, "clean", 3])
def test_attacks_are_a_list(place: Path, attacks: Any) -> None:
    with pytest.raises(UserError) as error:
        fd.evaluate(tiny(num_classes=3), place / "shards", attacks=attacks)
    assert str(error.value) == f"attacks must be a list of names, e.g. ['clean', 'pgd20'], got {attacks!r}"


def test_a_model_in_place_of_its_name_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        fd.create_model(tiny())  # type: ignore[arg-type]
    assert str(error.value).startswith("model.backbone: Input should be a valid string (got AdaptedModel( (backbone):")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_several_adapters_take_the_remedy_that_they_name(place: Path) -> None:
    several = fd.MultiAdapter({"a": str(place / "adapter")})
    bright = images() * 255
    for model in (several, several.select("a")):
        with pytest.raises(UserError) as error:
            model(bright)
        assert str(error.value).endswith("where they are meant, set model.pixels_checked = True")
        model.pixels_checked = True
        assert torch.equal(several(bright, "a"), _unchecked(place)(bright))
        model.pixels_checked = False


def _unchecked(place: Path) -> fd.AdaptedModel:
    model = fd.load(str(place / "adapter"))
    model.pixels_checked = True
    return model


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda one: fd.MultiAdapter([one]), "adapters: must be {{name: folder, ...}} with at least one, got [{0!r}]"),
        (lambda one: fd.MultiAdapter(one), "adapters: must be {{name: folder, ...}} with at least one, got {0!r}"),
        (
            lambda one: fd.MultiAdapter({"a": one})(images(), 0),
            "adapter: must be a name, a list of one name per sample, or None, got 0",
        ),
        (lambda one: fd.MultiAdapter({"a": one}).select("b"), "adapter: there is no 'b'; there are: a"),
    ],
)
def test_other_choices_of_adapters_are_refused(place: Path, call: Callable[[Any], Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        call(str(place / "adapter"))
    assert str(error.value) == line.format(str(place / "adapter"))
