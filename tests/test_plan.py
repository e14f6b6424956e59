"""`--dry-run`: memory against a real rank's, rates of the benchmark, largest micro-batch, ZeRO advice."""

import ctypes
import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fulllora_dist.commands.plan import Prices, estimate
from fulllora_dist.commands.plan_counts import IMAGENET, EvaluationCounts, RunCounts, count_evaluation, count_run
from fulllora_dist.commands.plan_memory import largest_micro_batch, rank_memory, stage_advice, together
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.models.flops import pass_cost
from fulllora_dist.training.build import build_model
from fulllora_dist.training.phases import build_phases
from fulllora_dist.training.run import on_meta
from tests.ranks import RankServer
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]
M_MMAP_THRESHOLD = -3


WHOLE = {"model_kwargs": {}}
"""Of the model's settings: all twelve blocks."""


def config(micro: int, **sections: Any) -> Config:
    """ViT-S of two blocks at 96 pixels; `sections` replace or complete those of the config."""
    values: dict[str, Any] = {
        "model": {
            "backbone": "vit_small_patch16_224",
            "pretrained": False,
            "num_classes": 10,
            "image_size": 96,
            "model_kwargs": {"depth": 2},
        },
        "adapter": {"rank": 9},
        "threat": {"eps": 0.01},
        "method": "n_fgsm",
        "data": {"train": "none"},
        "optim": {"batch_size": micro, "ema_decay": 0.9},
        "run": {"output_dir": "none"},
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | section if both else section
    return Config.model_validate(values)


def counted(settings: Config, world: int = 1) -> RunCounts:
    model, phases = on_meta(settings, 1 << 16)
    return RunCounts(settings, model, phases, 1 << 16, world, [])


def _bytes(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def _rise(comm: Comm, settings: Config, large_blocks_are_mapped: bool) -> int:
    """How much the peak of the resident memory rises after the model is built: the engine, and two steps."""
    if large_blocks_are_mapped:  # and so given back; by default glibc keeps most of what was freed
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)
    model, phases = build_model(settings), build_phases(settings, 100)
    size, n = model.info.image_size, settings.optim.batch_size
    with torch.no_grad():
        model(torch.rand(1, 3, size, size))  # what a library keeps from its first call on
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would be used again, and the peak not rise
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = _bytes("VmRSS")
    engine = Engine(model, settings.optim, settings.distributed, {}, comm, 100)
    phases.prepare(model.backbone, size)
    for step in range(2):
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        phases.step(engine, Batch(images, torch.arange(n) % 10, torch.arange(n), torch.ones(n, dtype=torch.bool)), step)
    return _bytes("VmHWM") - before


@pytest.mark.parametrize(
    ("micro", "sections", "large_blocks_are_mapped"),
    [
        (32, {"model": WHOLE}, False),
        pytest.param(
            48,
            {"model": WHOLE, "distributed": {"activation_checkpointing": "all", "zero_stage": 0}},
            True,
            marks=pytest.mark.long,
        ),
    ],
    ids=["as it is", "checkpointing, without glibc's waste"],
)
def test_the_memory_is_a_real_ranks(
    rank_server: RankServer, micro: int, sections: dict, large_blocks_are_mapped: bool
) -> None:
    """No number of the model of memory was taken from a measurement."""
    settings = config(micro, **sections)
    memory = rank_memory(counted(settings))
    expected = together(memory) - memory["frozen weights"] - memory["adapter"]
    (rise,) = rank_server.run(1, _rise, settings, large_blocks_are_mapped)
    assert expected == pytest.approx(rise, rel=0.2)


def test_what_is_kept_is_what_autograd_saves_on_a_real_device() -> None:
    model, kept = tiny(), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    pixels = torch.rand(8, 3, 16, 16, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(pixels), torch.zeros(8, dtype=torch.int64))
    kept.setdefault(pixels.untyped_storage().data_ptr(), pixels.untyped_storage().nbytes())
    cost = pass_cost(model, 16, 8)
    assert 8 * cost.saved_bytes == pytest.approx(sum(kept.values()), rel=0.03)
    assert cost.saved_bytes < cost.peak_bytes < 1.2 * cost.saved_bytes


@pytest.mark.parametrize("checkpointing", ["off", "all"])
def test_the_largest_micro_batch_is_the_last_that_fits(checkpointing: Any) -> None:
    counts, card_gb = counted(config(64)), 4.0
    largest = largest_micro_batch(counts, checkpointing, card_gb)
    for micro, fits in ((largest, True), (round(1.03 * largest), False)):
        settings = config(micro, distributed={"activation_checkpointing": checkpointing})
        assert (together(rank_memory(counted(settings))) <= card_gb * 1e9) == fits


def test_the_stage_that_is_advised_fits() -> None:
    sections = {"finetune": "full", "distributed": {"zero_stage": 1}}
    counts = counted(config(8, **sections), world=8)
    each = [together(rank_memory(counts, stage=stage)) / 1e9 for stage in range(4)]
    assert each[0] > each[1] > each[3]
    assert stage_advice(counts, each[0] + 0.01).startswith("ZeRO: stage 0 fits into ")
    assert stage_advice(counts, each[1] + 0.01).startswith("ZeRO: stage 0 does not fit into ")
    assert stage_advice(counts, (each[2] + each[3]) / 2).startswith("ZeRO: stage 3 is the first that fits into ")
    assert stage_advice(counts, each[3] / 2).startswith("ZeRO: no stage fits into ")


def test_held_out_images_are_not_trained_on() -> None:
    """A run whose data is not there yet: ImageNet's, less the ten of each class that README holds out."""
    images = [count_run(config(8, data={"held_out": held_out})).images for held_out in (None, "none")]
    assert images == [IMAGENET, IMAGENET - 10 * 1000]


def test_everything_that_is_not_ready_is_named() -> None:
    notes = count_run(config(8, data={"validation": "val", "held_out": "held"})).notes
    assert [note.partition("/index.safetensors: no index there; ")[0] for note in notes] == [
        "not ready: data.train: none",
        "not ready: data.validation: val",
        "not ready: data.held_out: held",
    ]


def test_an_evaluation_is_counted_in_the_norms_of_its_balls() -> None:
    """APGD restarts four times in L1; a further norm costs what it costs alone."""

    def counts(norm: str, *further: str) -> EvaluationCounts:
        evaluation = {"attacks": ["apgd-ce", "pgd20"], "norms": further, "num_samples": 10}
        sections = {"threat": {"norm": norm, "eps": 0.01}, "data": {"train": "none", "validation": "none"}}
        found = count_evaluation(config(8, evaluation=evaluation, **sections))
        assert found is not None
        return found

    linf, l1, both = counts("linf"), counts("l1"), counts("linf", "l1=10")
    assert (linf.attacks[0][:11], l1.attacks[0][:13]) == ("apgd-ce 201", "apgd-ce 1,001")
    assert both.flops == linf.flops + l1.flops
    assert l1.flops / linf.flops == pytest.approx((1001 + 42) / (201 + 42), rel=0.01)
    assert [line.split(" where")[0] for line in both.attacks] == [
        "apgd-ce 201 passes an image in linf",
        "apgd-ce 1,001 passes an image in l1",
        "pgd20 42 passes an image",
    ]


def rates(folder: Path, **row: Any) -> Path:
    file = folder / "step.json"
    arms = {"fulllora": {"cpu_s": 9.0, "wall_s": 2.0}, "fulllora_compiled": {"cpu_s": 9.0, "wall_s": 1.0}}
    rows = [
        {
            "backbone": "vit_tiny_patch16_224",
            "image_size": 96,
            "batch": 50,
            "steps": 3,
            "precision": "fp32",
            "arms": arms,
        },
        {
            "backbone": "vit_small_patch16_224",
            "image_size": 96,
            "batch": 5,
            "steps": 3,
            "precision": "fp32",
            "arms": arms,
        },
    ]
    file.write_text(json.dumps({"cpu": "a CPU", "rows": [rows[0], rows[1] | row]}))
    return file


def test_hours_and_cost_follow_from_the_measured_step(tmp_path: Path) -> None:
    """Of a run whose step is the one that was measured: as many seconds as images / 5 x 2."""
    model = WHOLE | {"num_classes": 1000}
    settings = config(5, model=model, method={"name": "pgd", "steps": 3}, adapter={"head": "frozen", "rank": None})
    text = estimate(settings, 1, Prices((str(rates(tmp_path)),), price=10.0))
    batches = int(re.findall(r"([\d,]+) batches, [\d,]+ optimizer", text)[0].replace(",", ""))
    hours, cost = re.findall(r"EFLOP, ([\d.]+) hours of a rank at .* on 1 ranks, cost ([\d,]+)", text)[0]
    assert float(hours) == pytest.approx(batches * 2 / 3600, rel=0.01)
    assert float(cost.replace(",", "")) == pytest.approx(10 * batches * 2 / 3600, rel=0.01)
    assert "of vit_small_patch16_224 at 96 pixels, batch 5, PGD-3, fp32, measured on a CPU" in text


def test_without_a_row_of_its_precision_a_rate_is_assumed(tmp_path: Path) -> None:
    text = estimate(config(8, model={"precision": "bf16"}), 1, Prices((str(rates(tmp_path)),)))
    assert "GPU-hours at an assumed 300 TFLOP/s" in text


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "--rates: cannot read "),
        ("{}", "is no file of tools/benchmark.py step"),
        ('{"cpu": "x", "rows": []}', "has no row with the arm fulllora"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, line: str) -> None:
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=line):
        estimate(config(8), 1, Prices((str(file),)))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rates", "step.json"], "--rates is an option of --dry-run; add that"),
        (["--dry-run", "--memory-gb", "0"], "--memory-gb must be > 0, got 0"),
        (["--dry-run", "--price", "much"], "--price: invalid float value: 'much'"),
    ],
)
def test_what_is_no_dry_run_is_refused(rank_server: RankServer, arguments: list[str], line: str) -> None:
    script = ROOT / "fulllora_dist" / "train.py"
    ended = rank_server.launch(script, "--config", "none.yaml", *arguments).wait()
    assert ended.returncode == 2
    assert line in ended.stderr
    assert "Traceback" not in ended.stderr
