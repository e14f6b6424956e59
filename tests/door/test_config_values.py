"""A setting's value is what was written, and a mistake in it is one line that names where it was made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulllora_dist.config.load import load_config, read_frame
from fulllora_dist.core.errors import UserError
from fulllora_dist.launching.resources import read_profile, resources
from tests.door.conftest import ROOT
from tests.smallest import SMALLEST

TRAIN = ROOT / "fulllora_dist" / "train.py"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(SMALLEST)
    return tmp_path / "run.yaml"


def nested(key: str, text: str) -> str:
    """`a.b` and `text` as YAML, with the text as it is."""
    *sections, name = key.split(".")
    return (
        "".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(sections)) + f"{'  ' * len(sections)}{name}: {text}\n"
    )


VALUES: list[tuple[str, str, Any]] = [
    ("distributed.activation_checkpointing", "off", "off"),
    ("distributed.activation_checkpointing", "'off'", "off"),
    ("tracking.enabled", "off", False),
    ("tracking.enabled", "no", False),
    ("tracking.enabled", "True", True),
    ("tracking.publish", "on", True),
    ("model.pretrained", "yes", True),
    ("tracking.experiment_name", "2026-11-30", "2026-11-30"),
    ("tracking.experiment_name", "12:30", "12:30"),
    ("tracking.experiment_name", "no", "no"),
    ("tracking.run_name", "007", "007"),
    ("tracking.run_name", "1e3", "1e3"),
    ("tracking.run_name", "1.10", "1.10"),
    ("tracking.run_name", "1_000", "1_000"),
    ("tracking.run_name", "0x1F", "0x1F"),
    ("tracking.run_name", "true", "true"),
    ("tracking.run_name", "null", None),
    ("tracking.run_name", "~", None),
    ("tracking.run_name", "'null'", "null"),
    ("tracking.registered_model_name", "12", "12"),
    ("run.output_dir", "12", "12"),
    ("optim.lr", "1e-3", 0.001),
    ("optim.lr", "1", 1.0),
    ("optim.lr", "'1e-3'", 0.001),
    ("optim.epochs", "1e1", 10.0),
    ("optim.batch_size", "1e3", 1000),
    ("optim.batch_size", "010", 10),
    ("optim.batch_size", "1_000", 1000),
    ("optim.betas", "[0.8, .9]", (0.8, 0.9)),
    ("run.seed", "0x10", 16),
    ("run.seed", "0o17", 15),
    ("distributed.zero_stage", "2", 2),
    ("threat.eps", "8/255", 8 / 255),
    ("threat.eps", "0.5", 0.5),
    ("evaluation.eps", "[2/255, 0.25]", (2 / 255, 0.25)),
    ("evaluation.attacks", "[clean, pgd20]", ("clean", "pgd20")),
    ("model.class_indices", "[0, 8, 010]", [0, 8, 10]),
    ("model.model_kwargs", "{depth: 2, qkv_bias: false, mlp_ratio: 2.5, act: gelu, size: [4, 4], none: null}",
     {"depth": 2, "qkv_bias": False, "mlp_ratio": 2.5, "act": "gelu", "size": [4, 4], "none": None}),
    ("model.model_kwargs", "{act: 'off', rate: 1e-3}", {"act": "off", "rate": 0.001}),
    ("deepspeed", "{zero_optimization: {reduce_bucket_size: 5e8}}", {"zero_optimization": {"reduce_bucket_size": 5e8}}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_a_value_is_what_its_setting_says(path: Path, key: str, text: str, value: Any) -> None:
    """In a file, on the command line, and in the resolved config that is written and read again."""
    child = path.with_name("child.yaml")
    child.write_text("base: run.yaml\n" + nested(key, text))
    for config in (load_config(str(child)), load_config(str(path), [f"{key}={text}"])):
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (value, type(value))
    from omegaconf import OmegaConf

    (path.parent / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
    assert load_config(str(path.parent / "config.yaml")) == config
    assert read_frame(path.parent / "config.yaml").run == config.run
    (path.parent / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(path.parent / "config.yaml")) == config


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("optim.batch_size", "12:30", "optim.batch_size: Input should be a valid integer"),
        ("optim.batch_size", "true", "optim.batch_size: Input should be a valid integer"),
        ("optim.batch_size", "1.5", "optim.batch_size: Input should be a valid integer, got a number with a"),
        ("optim.lr", "off", "optim.lr: Input should be a valid number"),
        ("optim.lr", "null", "optim.lr: Input should be a valid number"),
        ("optim.lr", "-1", "optim.lr: Input should be greater than 0 (got -1)"),
        ("tracking.enabled", "2", "tracking.enabled: Input should be a valid boolean"),
        ("distributed.activation_checkpointing", "none",
         "distributed.activation_checkpointing: Input should be 'off', 'weight_step' or 'all' (got 'none')"),
        ("data.cache_dir", "None", 'data.cache_dir: None is text; write null to leave it unset, or "None"'),
        ("data.cache_dir", "s3://bucket/cache", "data.cache_dir: must be a folder on a disk, given by its path"),
        ("data.cache_dir", "file:///cache", "data.cache_dir: must be a folder on a disk, given by its path"),
        ("run.output_dir", "null", "run.output_dir: Input should be a valid string"),
        ("evaluation.attacks", "clean,pgd20", "evaluation.attacks: must be a list; write [clean,pgd20]"),
        ("data.train", "[a, b]", "data.train: Input should be a valid string (got ['a', 'b'])"),
        ("model.model_kwargs", "{qkv_bias: off}",
         "model.model_kwargs: off means one thing in YAML 1.1 and another in 1.2; write true, false"),
        ("model.model_kwargs", "{depth: 010}", "model.model_kwargs: 010 means one thing in YAML 1.1"),
        ("deepspeed", "{steps_per_print: 1_000}", "deepspeed: 1_000 means one thing in YAML 1.1"),
        ("deepspeed", "{wall_clock_breakdown: yes}", "deepspeed: yes means one thing in YAML 1.1"),
        ("optim", "null", "optim: must be a section of settings; it is empty: remove it, or write its settings"),
        ("optim", "[1]", "optim: must be a section of settings (got ['1'])"),
        ("optim", "3", "optim: must be a section of settings (got '3')"),
        ("optim.batch-size", "8", "unknown setting optim.batch-size; did you mean batch_size?"),
        ("optimizer", "{lr: 1}", "unknown setting optimizer; did you mean optim?"),
        ("run.output_dir", "${nowhere}", "run.output_dir: Interpolation key 'nowhere' not found"),
    ],
)  # fmt: skip
def test_a_mistake_is_blamed_on_where_it_was_made(path: Path, key: str, text: str, words: str) -> None:
    """The file itself, its base, the command line."""
    base, child = path.with_name("base.yaml"), path.with_name("child.yaml")
    base.write_text("base: run.yaml\n" + nested(key, text))
    child.write_text("base: base.yaml\nguard: {every: 20}\n")
    for file, overrides, source in (
        (base, [], str(base)),
        (child, ["run.seed=1"], str(base)),
        (path, ["run.seed=1", f"{key}={text}"], "command line"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(str(file), overrides)
        assert str(caught.value).startswith(f"{source}: {words}"), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        (["distributed.gradient_accumulation_steps=3"], "command line"),
        (["optim.batch_size=100"], "command line"),
        (["run.seed=3"], "{file}"),
    ],
)
def test_settings_that_disagree_are_blamed_on_the_last_word(path: Path, overrides: list[str], source: str) -> None:
    child = path.with_name("child.yaml")
    steps = 3 if source == "{file}" else 8
    child.write_text(f"base: run.yaml\ndistributed: {{gradient_accumulation_steps: {steps}}}\n")
    with pytest.raises(UserError) as caught:
        load_config(str(child), overrides)
    assert str(caught.value).startswith(
        f"{source.format(file=child)}: optim.batch_size must be divisible by distributed.gradient_accumulation_steps"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; it must contain settings, key: value"),
        ("# nothing\n", "is empty; it must contain settings, key: value"),
        ("- 1\n", "is a list; it must contain settings"),
        ("optim\n", "is a single value; it must contain settings"),
        ("a: 1\na: 2\n", "is not valid YAML: line 2: duplicate key a"),
        ("optim: {lr: 1, lr: 2}\n", "is not valid YAML: line 1: duplicate key lr"),
        ("optim:\n\tlr: 1\n", "is not valid YAML: line 2: a tab; indent with spaces"),
        ("data: {train: *.tar}\n", "is not valid YAML: line 1: "),
        (
            "data:\n  train: %20\n",
            "is not valid YAML: line 2: found character '%' that cannot start any token; quote a",
        ),
        ("data:\n  train: @x\n", "quote a value that begins with * & ! % @ or `"),
        ("data: {train: !x y}\n", "is not valid YAML: line 1: could not determine a constructor for the tag '!x'"),
        ("a: &a [*a]\n", "is not valid YAML: an alias refers to what it is in"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML: line 2: but found another document"),
        ("a: 'x\n", "is not valid YAML: line 2: found unexpected end of stream"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "bad.yaml"))
    assert str(caught.value).startswith(f"{tmp_path}/bad.yaml ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys(path: Path) -> None:
    """A key beside `<<` takes precedence over the merged one, as YAML has it; PyYAML reads the same."""
    text = "x: &x {lr: 1e-3, epochs: 3}\noptim:\n  <<: *x\n  epochs: 5\n"
    assert yaml.safe_load(text)["optim"]["epochs"] == 5
    path.with_name("child.yaml").write_text("base: run.yaml\n" + text)
    with pytest.raises(UserError, match="unknown setting x; known: finetune, model"):
        load_config(str(path.with_name("child.yaml")))
    text = "optim: &x {lr: 1e-2, epochs: 3}\nphases: [{fraction: 0.5, eps: &e 2/255}, {fraction: 0.5, eps: *e}]\n"
    path.with_name("child.yaml").write_text("base: run.yaml\n" + text)
    config = load_config(str(path.with_name("child.yaml")))
    assert (config.optim.lr, [phase.eps for phase in config.phases]) == (0.01, [2 / 255, 2 / 255])


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (["optim.betas=[0.8,0.9]"], "optim.betas", (0.8, 0.9)),
        (["tracking.run_name=a=b,c"], "tracking.run_name", "a=b,c"),
        (["tracking.run_name='007'"], "tracking.run_name", "007"),
        (['tracking.run_name="a: [b]"'], "tracking.run_name", "a: [b]"),
        (["tracking.run_name=a #b"], "tracking.run_name", "a #b"),
        (["tracking.run_name= a "], "tracking.run_name", "a"),
        (["plugins=[]"], "plugins", ()),
        (["optim.lr=1", "optim.lr=2"], "optim.lr", 2.0),
        (["optim={lr: 1e-2, epochs: 2}", "optim.epochs=3"], "optim.epochs", 3.0),
        (["method={name: free, replays: 5}"], "method.replays", 5),
        (["run.output_dir=${data.train}/x"], "run.output_dir", "shards/x"),
        (["run.seed=${optim.batch_size}", "optim.batch_size=8"], "run.seed", 8),
    ],
)
def test_overrides(path: Path, overrides: list[str], name: str, value: Any) -> None:
    found: Any = load_config(str(path), overrides)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("tracking.run_name=", "command line: tracking.run_name= has no value; write tracking.run_name=null for none"),
        ("optim.lr=  ", "command line: optim.lr=   has no value"),
        ("optim..lr=1", "'optim..lr=1' is not a setting; write key=value"),
        (".lr=1", "'.lr=1' is not a setting"),
        ("optim.lr", "'optim.lr' is not a setting; write key=value, e.g. optim.lr=1e-3"),
        ("data.train=[abc]/x", "command line: data.train: [abc]/x is not valid YAML ("),
        ("data.train={a", "command line: data.train: {a is not valid YAML ("),
        ("optim.lr={a: 1, a: 2}", "command line: optim.lr: {a: 1, a: 2} is not valid YAML (duplicate key a)"),
        ("phases.0.eps=0.1", "command line: phases: is a list; write all of it, e.g. phases=[...]"),
        ("tracking=mlflow", "command line: tracking: must be a section of settings (got 'mlflow')"),
    ],
)
def test_a_bad_override_is_one_line(path: Path, override: str, line: str) -> None:
    path.write_text(SMALLEST + "phases: [{fraction: 1}]\n")
    with pytest.raises(UserError) as caught:
        load_config(str(path), [override])
    assert str(caught.value).startswith(line), str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["method.steps=10", "method=trades"],
            "method.steps stands before method=trades, which drops it; write it after",
        ),
        (["method.steps=10", "method={name: trades}"], "method.steps stands before method=trades, which drops it"),
        (["method.steps=10", "method.name=trades"], "method.steps stands before method=trades, which drops it"),
        (
            ["guard.rollback_method.steps=10", "guard.rollback_method=trades"],
            "guard.rollback_method.steps stands before guard.rollback_method=trades, which drops it; write it after",
        ),
    ],
)
@pytest.mark.parametrize("below", ["guard: {rollback_method: {name: pgd}}\n", ""])
def test_a_setting_before_the_method_that_drops_it_is_refused(
    path: Path, overrides: list[str], line: str, below: str
) -> None:
    path.write_text(SMALLEST + below)
    with pytest.raises(UserError) as caught:
        load_config(str(path), overrides)
    assert str(caught.value).startswith(f"command line: {line}"), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=trades", "method.steps=10"], {"name": "trades", "steps": 10}),
        (["method.steps=10", "method=pgd"], {"name": "pgd", "steps": 10}),
        (["method.steps=10", "method.steps=5"], {"name": "pgd", "steps": 5}),
        (["method=n_fgsm", "method.noise=1", "method=trades"], {"name": "trades", "steps": 3}),  # a study's arms
        (["method={name: pgd, steps: 9}", "method=trades"], {"name": "trades", "steps": 3}),
    ],
)
@pytest.mark.parametrize("section", ["method", "guard.rollback_method"])
def test_a_method_takes_what_is_written_behind_it(
    path: Path, overrides: list[str], expected: dict[str, Any], section: str
) -> None:
    path.write_text(SMALLEST + "guard: {rollback_method: {name: pgd, steps: 2}}\n")
    found: Any = load_config(str(path), [text.replace("method", section, 1) for text in overrides])
    for part in section.split("."):
        found = getattr(found, part)
    found = found.model_dump()
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("option", ["train.py", "evaluate.py"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=-1", "error: command line: optim.lr: Input should be greater than 0 (got -1)"),
        ("tracking.run_name=", "error: command line: tracking.run_name= has no value"),
    ],
)
def test_by_command_line(path: Path, refused: Callable[..., str], option: str, override: str, words: str) -> None:
    line = refused(ROOT / "fulllora_dist" / option, "--config", path, override, cwd=path.parent, keep=(path.parent,))
    assert line.startswith(words)


def test_the_file_is_blamed_by_command_line(path: Path, refused: Callable[..., str]) -> None:
    path.write_text(SMALLEST + "optim: {lr: -1}\n")
    line = refused(TRAIN, "--config", path, "run.seed=1", cwd=path.parent, keep=(path.parent,))
    assert line == f"error: {path}: optim.lr: Input should be greater than 0 (got -1)"


def test_a_profile_is_read_by_the_same_rule(tmp_path: Path) -> None:
    text = "time: 4:00:00\naccount: 007\nqos: off\nmem: 400\ngpus: no\nsbatch: {exclusive: true, nice: 010, hold: no}\n"
    (tmp_path / "site.yaml").write_text(text)
    asked = resources(read_profile(str(tmp_path / "site.yaml"), ""), {})
    assert (asked.time, asked.account, asked.qos, asked.mem, asked.gpus) == (240, "007", "off", "400", False)
    assert asked.sbatch == {"exclusive": True, "nice": "010", "hold": "no"}


@pytest.mark.parametrize("its_own", [True, False])
def test_more_epochs_are_another_schedule(path: Path, its_own: bool) -> None:
    """The learning rate, the phases and the warm-ups are fractions of the whole run: the line names the folder that the
    checkpoint is in, and what does train on."""
    from fulllora_dist.training.resume import check_same_run

    saved = load_config(str(path), ["optim.epochs=10"]).model_dump(mode="json")
    more = load_config(str(path), ["optim.epochs=20", *([] if its_own else ["run.resume_from=old/checkpoints/7"])])
    with pytest.raises(UserError) as caught:
        check_same_run(more, saved, its_own)
    place, other = ("run.output_dir: out holds", "another output folder") if its_own else (
        "run.resume_from: old/checkpoints/7 is of", "remove run.resume_from"
    )  # fmt: skip
    assert str(caught.value) == (
        f"{place} a run with optim.epochs=10.0, got 20.0; use the same setting to resume, or {other} and, to train its "
        "adapter for longer on a new schedule, adapter.init_from=ADAPTER"
    )
