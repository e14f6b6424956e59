"""How far a run has come in its data, counted in global batches that were trained on; and what is to be read next."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.plan import PLAN_VERSION, EpochPlan, Segment, epoch_plan, share, steps_per_epoch


def check_rank(world: int, rank: int) -> None:
    """Raise UserError for a rank outside the world."""
    if not 0 <= rank < world:
        raise UserError(f"rank must be >= 0 and < world={world}, got {rank}")


def check_batch_size(batch_size: int, world: int) -> None:
    """Raise UserError for a global batch that does not divide into equal shares."""
    if batch_size < 1 or batch_size % world:
        raise UserError(f"batch size must be >= 1 and a multiple of world={world}, got {batch_size}")


class Spares(NamedTuple):
    """Where the substitutes of a work's samples come from."""

    plan: EpochPlan
    lanes: np.ndarray
    step: int

    def of(self, first: int, place: int) -> Iterator[int]:
        """All other samples of the epoch in the order in which they replace that of slot `first + place`: those of
        its window, the next ones first, as they have been read already; of its lane; of the lanes after it."""
        start, end = self.plan.window_of(first + place, self.step)
        lane = self.lanes[place]
        yield from np.roll(lane[start:end], start - self.step)[1:].tolist()
        yield from np.roll(lane, -end)[: len(lane) - (end - start)].tolist()
        for distance in range(1, self.plan.batch_size):
            (other,) = self.plan.lanes((first + place + distance) % self.plan.batch_size, 1)
            yield from other.tolist()


class Work(NamedTuple):
    """What one process reads and decodes of one batch.

    Attributes:
        epoch: keys the augmentation.
        slot: global batch slot of the first sample.
        ids: int64 [b], -1 pads.
        begin: int64, the samples (of this and later works) whose reading begins with this work, most urgent first.
        spares: None where nothing may replace a sample.
    """

    epoch: int
    slot: int
    ids: np.ndarray
    begin: np.ndarray
    spares: Spares | None = None


@dataclass(frozen=True)
class TrainWorks:
    """The works of slots first .. first + count - 1 from a position on, without end. Workers divide the slots."""

    n: int
    seed: int
    batch_size: int
    first: int
    count: int
    epoch: int
    done: tuple[Segment, ...]
    steps: int

    def __call__(self, worker: int = 0, workers: int = 1) -> Iterator[Work]:
        offset, count = share(self.count, workers, worker)
        first, epoch, done, start = self.first + offset, self.epoch, self.done, self.steps
        while True:
            plan = epoch_plan(self.n, self.seed, epoch, self.batch_size, done)
            lanes = plan.lanes(first, count)
            for step in range(start, plan.steps):
                begin = _windows(plan, lanes, first, step, everywhere=step == start)
                yield Work(epoch, first, lanes[:, step], begin, Spares(plan, lanes, step))
            epoch, done, start = epoch + 1, (), 0


def _windows(plan: EpochPlan, lanes: np.ndarray, first: int, step: int, everywhere: bool) -> np.ndarray:
    """What is left of the windows that begin at `step`, or of all windows; in the order of its turn."""
    chosen = [i for i in range(len(lanes)) if everywhere or plan.window_of(first + i, step)[0] == step]
    ends = [plan.window_of(first + i, step)[1] for i in chosen]
    turns = np.concatenate([np.arange(step, end) for end in ends] or [np.empty(0, dtype=np.int64)])
    ids = np.concatenate([lanes[i, step:end] for i, end in zip(chosen, ends, strict=True)] or [turns])
    return ids[np.argsort(turns, kind="stable")]


class StreamPosition:
    """Position in the epochs of an index, at any batch sizes one after the other.

    Attributes:
        batch_size: the present one, of the global batch.
        epoch: the one in progress.
        done: what was taken from it at other batch sizes.
        steps: global batches of the present size taken from it.
        step: global batches since the beginning of the run, as the trainer counts.
        dropped: samples that the epoch leaves out in which this position was begun or loaded.
    """

    def __init__(self, index: Index, seed: int, batch_size: int):
        check_batch_size(batch_size, world=1)
        if batch_size > len(index):
            raise UserError(f"batch size {batch_size} exceeds the {len(index)} samples of the data")
        self.batch_size = batch_size
        self._n, self._seed = len(index), seed
        self._identity = {"plan": PLAN_VERSION, "index_hash": index.hash, "seed": seed}
        self._begin(0, 0, (), 0)

    def _begin(self, step: int, epoch: int, done: tuple[Segment, ...], steps: int) -> None:
        self._from = (step, epoch, done, steps)
        plan = epoch_plan(self._n, self._seed, epoch, self.batch_size, done)
        self._first_steps, self.dropped = plan.steps, plan.dropped
        self.commit(step)

    def commit(self, step: int) -> None:
        """`step` global batches have been trained on since the beginning of the run."""
        begun, epoch, done, steps = self._from
        taken = steps + step - begun
        assert taken >= 0, f"step {step} lies before step {begun}, where this position was loaded"
        if taken >= self._first_steps:
            more, taken = divmod(taken - self._first_steps, steps_per_epoch(self._n, self.batch_size))
            epoch, done = epoch + 1 + more, ()
        self.step, self.epoch, self.done, self.steps = step, epoch, done, taken

    def works(self, world: int, rank: int) -> TrainWorks:
        """What `rank` has to read from here on. A rank holds batch_size / world neighbouring slots."""
        count = self.batch_size // world
        return TrainWorks(self._n, self._seed, self.batch_size, rank * count, count, self.epoch, self.done, self.steps)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: {"plan", "index_hash", "seed", "step", "epoch", "segments": [{"batch_size", "steps"}, ...]}. The
        last segment is the one in progress. Nothing in it depends on ranks or workers."""
        segments = [*self.done, Segment(self.batch_size, self.steps)]
        return {
            **self._identity,
            "step": self.step,
            "epoch": self.epoch,
            "segments": [segment._asdict() for segment in segments],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`: exactly there at the same batch size; at another one with what remains of the epoch.

        Raises:
            UserError: it belongs to other data or another seed.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint's stream has {name} {state.get(name)!r}, this one {value!r}: "
                    "resume with the data and seed that the run began with"
                )
        *done, last = (Segment(int(s["batch_size"]), int(s["steps"])) for s in state["segments"])
        steps = last.steps
        if last.batch_size != self.batch_size:
            done, steps = [*done, last] if last.steps else done, 0
        self._begin(int(state["step"]), int(state["epoch"]), tuple(done), steps)
