"""The text of `--dry-run`: what a run or an evaluation costs, without a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

from fulllora_dist.commands.plan_counts import EvaluationCounts, RunCounts, count_evaluation, count_run
from fulllora_dist.commands.plan_memory import CARDS, checkpointing_table, rank_memory, stage_advice, together
from fulllora_dist.commands.plan_rates import Rate, measured_rate
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import size_in


@dataclass(frozen=True)
class Prices:
    """What the command line says of the machines.

    Attributes:
        rates: JSON files of tools/benchmark.py step; without them rates are assumed.
        memory_gb: memory of a GPU, 10**9 bytes; None for those of `CARDS`.
        price: of an hour of a GPU, or of a rank without one; None prints no cost.
    """

    rates: Sequence[str] = ()
    memory_gb: float | None = None
    price: float | None = None

    @property
    def cards(self) -> tuple[float, ...]:
        return CARDS if self.memory_gb is None else (self.memory_gb,)

    def cost(self, hours: float) -> str:
        return "" if self.price is None else f", cost {hours * self.price:,.0f}"


def estimate(config: Config, ranks: int | None = None, prices: Prices | None = None) -> str:
    """Estimate parameters, passes, FLOPs, memory and communication of a run, as readable text.

    Args:
        ranks: number of ranks, see `count_run`.

    Raises:
        UserError: invalid settings.
    """
    prices = prices or Prices()
    counts = count_run(config, ranks)
    model, phases = counts.model, counts.phases
    rate = run_rate(counts, prices.rates)
    flops = counts.flops(counts.checkpointing)
    hours = rate.hours(flops)
    elapsed = "" if not prices.rates else f", {hours / counts.world:.2g} hours on {counts.world} ranks"
    memory = rank_memory(counts)
    lines = [
        f"{model.info.name} at {model.info.image_size} pixels, {config.finetune}, "
        f"{config.model.precision}, ZeRO-{config.distributed.zero_stage}, {counts.world} ranks",
        str(model.report),
        f"  rank of the branches: {model.spec.rank}" if model.spec.rank else "  no branches",
        *_phase_lines(counts),
        f"{phases.total_steps:,} batches, {phases.total_updates:,} optimizer updates on {counts.images:,} images; "
        f"whole run {flops / 1e18:.2f} EFLOP, {_figure(hours)} {rate.unit} at {rate.source}"
        f"{elapsed}{prices.cost(hours)}",
        f"memory a rank at micro-batch {counts.micro}: "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        + f"; together {together(memory) / 2**30:.1f} GiB",
        *checkpointing_table(counts, prices.cards),
        stage_advice(counts, prices.cards[0]),
        _communication_line(counts, memory),
    ]
    evaluation = count_evaluation(config)
    if evaluation is not None:
        beside = together(rank_memory(counts, micro=0))
        lines.append(_evaluation_line(config, evaluation, prices, beside))
    return "\n".join([*lines, *counts.notes])


def estimate_evaluation(config: Config, prices: Prices | None = None) -> str:
    """Estimate passes, FLOPs and memory of an evaluation, as readable text.

    Raises:
        UserError: invalid settings.
    """
    evaluation = count_evaluation(config)
    if evaluation is None:
        raise UserError("data.validation is not set; set it to the folder of shards to evaluate on")
    return _evaluation_line(config, evaluation, prices or Prices())


def _figure(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"


def run_rate(counts: RunCounts, files: Sequence[str]) -> Rate:
    """The rate of a run, from files of tools/benchmark.py step; see `measured_rate`."""
    phase = counts.phases.phases[-1]
    attack, _ = counts.costs(phase, "off")
    settings = counts.config.model
    return measured_rate(
        files, settings.backbone, counts.size(phase), attack.flops, settings.precision, settings.compile
    )


def _phase_lines(counts: RunCounts) -> list[str]:
    lines = []
    for phase in counts.phases.phases:
        method, batches = phase.method, phase.end - phase.first
        forward, backward = method.passes()
        attack, step = counts.costs(phase, counts.checkpointing)
        lines.append(
            f"{method.settings.name} at {counts.size(phase)} pixels, "
            f"{size_in(method.threat.norm, method.threat.eps)}: {forward} forward, {backward} backward passes a batch; "
            f"{batches:,} batches, {phase.updates:,} updates; attack pass {attack.flops / 1e9:.1f} GFLOP, "
            f"weight step {method.images_in_weight_step * step.flops / 1e9:.1f} GFLOP an image"
        )
    return lines


def _communication_line(counts: RunCounts, memory: dict[str, float]) -> str:
    adapter = 4 * counts.model.report.trainable
    stage = counts.config.distributed.zero_stage
    sent = (2 if stage == 0 else 3) * adapter * (counts.world - 1) / counts.world
    line = f"communication a rank and update: {sent / 2**20:.1f} MiB of gradients and updated parameters"
    if stage < 3:
        return f"{line}, attack passes none"
    passes = counts.update_passes() * counts.config.distributed.gradient_accumulation_steps
    gathered = 2 * passes * counts.world * (memory["frozen weights"] + memory["adapter"])
    return f"{line}, {gathered / 2**30:.1f} GiB of weights gathered"


def _evaluation_line(config: Config, counts: EvaluationCounts, prices: Prices, beside: float = 0) -> str:
    """Cost of an evaluation; `beside`: bytes that a training holds while it evaluates at its end."""
    rate = measured_rate(prices.rates, config.model.backbone, counts.size, counts.pass_flops, "fp32", False)
    hours = rate.hours(counts.flops)
    falling = rate.hours(counts.half_flops)
    half = f", {falling:.2g} where half of the images fall to its first part" if falling < hours else ""
    training = " beside the trained model" if beside else ""
    return (
        f"evaluation of {counts.images:,} images: {', '.join(counts.attacks)}; {hours:.2g} {rate.unit} at "
        f"{rate.source}{half}{prices.cost(hours)}; in fp32 and batches of {counts.batch} "
        f"{(counts.batch_bytes + beside) / 2**30:.1f} GiB a rank{training}"
    )
