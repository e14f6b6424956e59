"""Bad settings are refused before anything heavy starts, with one line that says what would be right."""

import io
import re
import tarfile
from pathlib import Path

import pytest
import yaml

from fulllora_dist.attacks.threat import Linf
from fulllora_dist.config.describe import describe_settings
from fulllora_dist.config.load import load_config, read_frame
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.methods import METHODS
from fulllora_dist.training.inputs import check_inputs
from fulllora_dist.training.phases import build_phases
from tests.smallest import SMALLEST

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = {yaml.safe_load(path.read_text()).get("base") for path in CONFIGS.glob("*.yaml")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(SMALLEST)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    "file", [p for p in sorted(CONFIGS.glob("*.yaml")) if p.name not in BASES], ids=lambda p: p.stem
)
def test_ready_configs_load_and_build_their_method(file: Path) -> None:
    config = load_config(str(file))
    method = METHODS[config.method.name](config.method, Linf(config.threat.eps), config.run.seed)
    assert min(method.passes()) >= 1
    assert f"--config configs/{file.name}" in file.read_text()


def test_values_come_from_file_base_and_command_line(path: Path) -> None:
    (path.parent / "sub").mkdir()
    child = path.parent / "sub" / "child.yaml"
    child.write_text("base: ../run.yaml\noptim: {lr: 2e-3, grad_clip: 0.5}\n")
    grandchild = path.parent / "grandchild.yaml"
    grandchild.write_text("base: sub/child.yaml\noptim: {grad_clip: 0.25}\nthreat: {eps: 0.5}\n")
    config = load_config(str(grandchild), ["optim.epochs=1e1", "threat.eps=8/255", "optim.betas=[0.8,0.9]"])
    assert (config.optim.lr, config.optim.grad_clip, config.optim.epochs, config.optim.betas) == (
        2e-3,
        0.25,
        10,
        (0.8, 0.9),
    )
    assert config.threat.eps == 8 / 255
    assert config.run.output_dir == "out"
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.model_dump()["method"] == {
        **{"name": "pgd", "steps": 2, "step_size": None, "random_start": True},
        **{"attention_drop": 0, "perturbation_mask": 0, "mask_patch": None, "clean_fraction": 0},
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method.steps=5"], {"name": "pgd", "steps": 5}),
        (["method=pgd", "method.steps=5"], {"name": "pgd", "steps": 5}),
        (["method=free"], {"name": "free", "replays": 4}),
        (["method=free", "method.replays=3"], {"name": "free", "replays": 3}),
        (["method={name: free, replays: 5}"], {"name": "free", "replays": 5}),
        (["method.name=free", "method.replays=2"], {"name": "free", "replays": 2}),
        (["method.name=n_fgsm"], {"name": "n_fgsm", "noise": 2.0, "step": 1.0}),
    ],
)
def test_another_method_drops_the_settings_of_the_first(path: Path, overrides: list[str], expected: dict) -> None:
    method = load_config(str(path), overrides).method.model_dump()
    assert {key: method[key] for key in expected} == expected


def test_a_file_may_name_the_method_of_settings_below_it(path: Path) -> None:
    path.write_text(SMALLEST.replace("method: {name: pgd, steps: 2}", "method: {steps: 2}"))
    child = path.with_name("child.yaml")
    child.write_text("base: run.yaml\nmethod: {name: free, replays: 3}\n")
    assert load_config(str(child)).method.model_dump()["replays"] == 3


@pytest.mark.parametrize("written", ["method: pgd", "method: {name: pgd}"])
def test_a_method_by_name_alone_takes_settings_from_above(path: Path, written: str) -> None:
    path.write_text(SMALLEST.replace("method: {name: pgd, steps: 2}", written))
    child = path.with_name("child.yaml")
    child.write_text("base: run.yaml\nmethod: {steps: 7}\n")
    assert load_config(str(child)).method.model_dump()["steps"] == 7
    assert load_config(str(path), ["method.steps=8"]).method.model_dump()["steps"] == 8


REFUSED = {
    "optim.lrr=1": "unknown setting optim.lrr; did you mean lr?",
    "optmi.lr=1": "unknown setting optmi; did you mean optim?",
    "run.ouptut=x": r"unknown setting run.ouptut; did you mean output_dir\?",
    "method.stepz=1": "unknown setting method.stepz; did you mean steps?",
    "threat.eps=4": r"threat.eps: 4 is outside \[0, 1\].* write 4/255",
    "threat.eps=0..5": "threat.eps: '0..5' is not a size in pixels",
    "threat.eps=-0.1": "threat.eps: -0.1 is outside",
    "threat.eps=nan": "threat.eps: nan is outside",
    "threat.norm=l3": "threat.norm: .*'linf', 'l2' or 'l1'.*'l3'",
    "threat.norm=l2 threat.eps=-3": "threat.eps: -3 is outside",
    "targets.mix_probability=0.5": "targets: mix_probability has no effect",
    "targets.mixup=0.2 method=mart": "method: mart needs one label per image; remove targets.mixup",
    "plugins=noise.py": r"plugins: must be a list of modules or files, got 'noise.py'; write plugins=.noise.py.",
    "plugins=3": "plugins: must be a list of modules or files, got '3'",
    "method.name=[pgd]": r"method: name: unknown method \['pgd'\]",
    "method=trades method.start=4": r"method.start: 4 is outside \[0, 1\].* write 4/255",
    "plugins=[no_such_module]": "plugins: no_such_module cannot be imported .ModuleNotFoundError",
    "plugins=[no/such/file.py]": "plugins: no/such/file.py cannot be imported .FileNotFoundError",
    "method.step_size=2": r"method.step_size: 2 is outside \[0, 1\].* write 2/255",
    "method=pdg": "method: name: unknown method 'pdg'; known: fgsm_rs, free, mart",
    "method=[pgd]": r"method: must be a section of settings \(got \['pgd'\]\)",
    "finetune=lroa": "finetune: .*'lora'.*'lroa'",
    "distributed.gradient_accumulation_steps=3": "optim.batch_size must be divisible by .*got 256 and 3",
    "deepspeed.train_batch_size=8": "deepspeed.train_batch_size is derived from optim.batch_size",
    "deepspeed.bf16.enabled=true": "deepspeed.bf16 is derived from model.precision",
    "deepspeed.fp16.enabled=true": "deepspeed.fp16 is derived from model.precision",
    "deepspeed.gradient_clipping=1": "deepspeed.gradient_clipping is derived from optim.grad_clip",
    "deepspeed.optimizer.type=Adam": "deepspeed.optimizer is derived from optim",
    "deepspeed.zero_optimization.stage=3": "stage is derived from distributed.zero_stage",
    "deepspeed.zero_optimization=3": "deepspeed.zero_optimization: must be a section, got 3",
    "deepspeed.zero_optimization=null": "deepspeed.zero_optimization: must be a section, got None",
    "data.crop_scale=[1.0,0.25]": r"data.crop_scale: must be \[least, greatest\] of the area, got \[1.0, 0.25\]",
    "data.augment=mirror": "data.augment: .*'none', 'flip', 'crop' or 'randaugment'.*'mirror'",
    "data.decode=opencv": "data.decode: .*'fast' or 'pil'.*'opencv'",
    "data.randaugment.magnitude=31": "data.randaugment.magnitude: .*less than or equal to 30.*31",
    "data.randaugment.num_ops=0": "data.randaugment.num_ops: .*greater than or equal to 1.*0",
    "optim.lr=fast": "optim.lr: .*valid number.*fast",
    "optim.lr=inf": "optim.lr: .*finite",
    "optim.betas=[0.9,1.1]": "optim.betas.1: .*less than 1",
    "model.std=[0,1,1]": "model.std.0: .*greater than 0",
    "model.class_indices=[]": "model.class_indices: .*at least 2",
    "model.class_indices=[-1,2]": "model.class_indices.0: .*greater than or equal to 0",
    "model=": "command line: model= has no value; write model=null for none",
    "optim=3": r"optim: must be a section of settings \(got '3'\)",
    "tracking=mlflow": "tracking: must be a section of settings",
    "run.output_dir=": "run.output_dir= has no value; write run.output_dir=null",
    "run.output_dir=${nowhere}": "nowhere",
    "optim.lr=[": r"command line: optim.lr: \[ is not valid YAML",
    "optim.lr": "'optim.lr' is not a setting; write key=value",
    "=3": "'=3' is not a setting; write key=value",
    "finetune=full adapter.init_from=a": "adapter.init_from: finetune: full has no adapter",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_bad_override_is_refused(path: Path, override: str) -> None:
    with pytest.raises(UserError, match=REFUSED[override]) as caught:
        load_config(str(path), override.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("[{fraction: 0.5}, {fraction: 0.4}]", "phases: their fractions must sum to 1, got 0.9"),
        ("[{frac: 1}]", "unknown setting phases.0.frac; did you mean fraction?"),
        ("[{fraction: 0.5, method: mart}, {fraction: 0.5}]", "phases.0.method: mart needs one label"),
        ("[{fraction: 0.5}, {fraction: 0.5, method: pdg}]", "phases.1.method: name: unknown method 'pdg'"),
        (
            "[{fraction: 1, method: {name: pgd, stepz: 1}}]",
            "unknown setting phases.0.method.stepz; did you mean steps?",
        ),
        ("[{fraction: 1, eps: 4}]", r"phases.0.eps: 4 is outside \[0, 1\].* write 4/255"),
        (
            "[{fraction: 1, method: {name: free, step_size: 2}}]",
            "phases.0.method.step_size: 2 is outside.* write 2/255",
        ),
    ],
)
def test_bad_phases_are_refused(path: Path, phases: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_config(str(path), ["targets.cutmix=1", f"phases={phases}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALLEST.replace("model:", "modle:"), "unknown setting modle; did you mean model?"),
        (SMALLEST.replace("eps: 4/255", ""), "threat.eps is missing"),
        (SMALLEST.replace("out}", "'???'}"), "mandatory value: output"),
        ("", "is empty; it must contain settings"),
        ("- 1\n", "is a list; it must contain settings"),
        ("3\n", "is a single value; it must contain settings"),
        ("model: [\n", "is not valid YAML"),
        (SMALLEST + "run: {}\n", "duplicate key run"),
        ("base: gone.yaml\n", "gone.yaml does not exist"),
        ("base: bad.yaml\n", "refers back to itself"),
        ("base: [a, b]\n", r"base: must be one file, got \['a', 'b'\]"),
        ("base: below.yaml\nmethod: {name: pgd}\n", "method: is a list; write all of it"),
        (None, "does not exist; see configs/ for examples"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "bad.yaml"
    (tmp_path / "below.yaml").write_text("method: [1]\n")
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "world", "words"),
    [
        ("optim.batch_size=6", 4, "optim.batch_size must be a multiple of 4"),
        (
            "optim.batch_size=12 distributed.gradient_accumulation_steps=2",
            4,
            "optim.batch_size must be a multiple of 8",
        ),
        ("model.checkpoint_path=gone.pth", 1, "model.checkpoint_path: gone.pth does not exist"),
        ("adapter.init_from=gone", 1, "adapter.init_from: gone does not exist"),
        ("run.resume_from=gone", 1, "run.resume_from: gone does not exist"),
        ("run.resume_from=file:///gone", 1, "run.resume_from: file:///gone does not exist"),
        ("data.train=gone", 1, "data.train: gone/index.safetensors: no index there"),
        ("data.train=pipe:cat", 1, "data.train: pipe:cat: must be a path or a URL of file://, s3://"),
        ("data.train=ftp://host/x", 1, "data.train: ftp://host/x: must be a path or a URL of"),
        ("data.validation=gone", 1, "data.validation: gone/index.safetensors: no index there"),
    ],
)
def test_what_is_missing_or_indivisible_is_refused(path: Path, override: str, world: int, words: str) -> None:
    shards = path.parent / "shards"
    shards.mkdir()
    with tarfile.open(shards / "train-000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "a.cls"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"0"))
    index_shards([str(shards)], progress=False)
    small = [f"data.train={shards}", "optim.batch_size=1"]
    check_inputs(load_config(str(path), small), world=1)
    with pytest.raises(UserError, match=words):
        check_inputs(load_config(str(path), [*small, *override.split()]), world=world)


def test_epochs_and_warm_up_are_counted_in_batches(path: Path) -> None:
    overrides = ["method.name=free", "method.replays=4", "optim.epochs=3", "threat.eps_warmup_ratio=0.25"]
    phases = build_phases(load_config(str(path), overrides), steps_per_epoch=21)
    method = phases.at(0).method
    assert (phases.total_steps, phases.total_updates, method.warmup.eps) == (
        16,
        64,
        4,
    )  # 63 updates, four on each batch
    assert [method.threat_at(step).eps * 255 for step in (0, 3, 4, 9)] == pytest.approx([4 / 5, 16 / 5, 4, 4])


@pytest.mark.parametrize("written", ["none", "null"])
def test_a_run_without_tracking(path: Path, tmp_path: Path, written: str) -> None:
    """In a file or over a file's section; what is written of it is read again."""
    path.write_text(f"{SMALLEST}tracking: {written}\n")
    (tmp_path / "section.yaml").write_text(f"{SMALLEST}tracking: {{experiment_name: mine}}\n")
    for config in (load_config(str(path)), load_config(str(tmp_path / "section.yaml"), [f"tracking={written}"])):
        assert not config.tracking.enabled
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert load_config(str(tmp_path / "config.yaml")) == config
        assert not read_frame(tmp_path / "config.yaml").tracking.enabled


def test_the_help_lists_every_setting_with_its_meaning(path: Path) -> None:
    lines = describe_settings().splitlines()
    described = {line.split()[0]: lines[i + 1].strip() for i, line in enumerate(lines) if re.match(r" +\S+ \(", line)}

    def leaves(values: dict, prefix: str) -> list[str]:
        nested = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) and v else [prefix + k] for k, v in values.items()]
        return [name for names in nested for name in names]

    names = leaves(load_config(str(path)).model_dump(), "")
    assert len(names) > 50
    assert not [name for name in names if name != "method.name" and not described.get(name)]
    assert all(f"method: {name}" in lines for name in METHODS)
