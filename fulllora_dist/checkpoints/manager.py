"""The checkpoints of one run, as rank 0 keeps them: the newest is found, others are written beside the training."""

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fulllora_dist.checkpoints.format import (
    Checkpoint,
    CheckpointMetadata,
    DamagedCheckpoint,
    address,
    delete_checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_newest_checkpoint,
    read_whole_checkpoint,
    step_of,
    write_checkpoint,
)
from fulllora_dist.checkpoints.settings import RunSettings
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.storage import store, urls

if TYPE_CHECKING:
    from torch import Tensor


def checkpoint_places(settings: RunSettings) -> list[str]:
    """Folders or URLs where the checkpoints of a run may lie, whatever `run.checkpoint_dir` was before a restart."""
    before = _checkpoint_dir_before(settings.output_dir)
    own = os.path.join(settings.output_dir, "checkpoints")
    return list(dict.fromkeys([*_places(settings), *([address(before)] if before else []), own]))


def _places(settings: RunSettings) -> list[str]:
    """Where they are written; each takes what the ones before it refuse."""
    own = os.path.join(settings.output_dir, "checkpoints")
    if settings.checkpoint_dir is None:
        return [own]
    place = address(settings.checkpoint_dir)
    return [place, own] if urls.is_remote(place) else [place]


def _checkpoint_dir_before(output: str) -> str | None:
    """`run.checkpoint_dir` of the newest start, as its config.yaml in the output folder has it."""
    try:
        saved = OmegaConf.load(os.path.join(output, "config.yaml"))
        return OmegaConf.select(saved, "run.checkpoint_dir")
    except (OSError, YAMLError, OmegaConfBaseException):
        return None


def kept_besides(metadata: CheckpointMetadata) -> frozenset[int]:
    """Steps of the best and the good checkpoint, where a checkpoint's metadata names some."""
    best, good = metadata.get("best"), metadata.get("guard", {}).get("good")
    return frozenset(step for step in (best["step"] if best else None, good) if step is not None)


class CheckpointManager:
    """Finds and writes checkpoints; used on rank 0 alone.

    They lie under `run.checkpoint_dir`, or in the output folder. Where a bucket refuses one, it goes to the output
    folder, and is found there by a restart with the same disk. A checkpoint that nothing takes costs a warning: the
    training continues, and older checkpoints are as they were. Damaged ones stay where they are, too.

    Attributes:
        newest: step of the newest whole checkpoint, None where there is none.
    """

    def __init__(self, settings: RunSettings, say: Callable[[str], None]):
        self._settings, self._say = settings, say
        self._places, self._search = _places(settings), checkpoint_places(settings)
        self.newest: int | None = None
        self._kept: frozenset[int] = frozenset()  # whole ones that are kept besides the newest
        self._damaged: set[int] = set()
        self._hurried = self._due = False
        self._written_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: tuple[int, frozenset[int], Future[dict[str, str]]] | None = None

    def find(self) -> Checkpoint | None:
        """The run's own newest whole checkpoint, else that of `run.resume_from`, else None.

        Raises:
            UserError: a bucket that does not answer, no whole checkpoint among those there are, or a given one that is
                damaged.
            OSError: a disk that does not answer.
        """
        checkpoint, damaged = read_newest_checkpoint(*self._search)
        self._damaged = {step_of(path) for path in damaged}
        if damaged and checkpoint is None:
            raise UserError(
                f"run.output_dir: none of the {len(damaged)} checkpoints of {self._settings.output_dir} is whole "
                f"({redacted(next(iter(damaged.values())))}); choose another folder to start over"
            )
        for line in damaged.values():
            self._say(f"warning: {redacted(line)}; resuming from an older checkpoint")
        if checkpoint is not None:
            self.newest = checkpoint[1]["step"]
            self._kept = kept_besides(checkpoint[1])
        elif self._settings.resume_from is not None:
            try:
                checkpoint = read_checkpoint(self._settings.resume_from)
            except DamagedCheckpoint as error:
                raise UserError(f"run.resume_from: {error}") from None
            checkpoint[1].update({"mlflow_run_id": None, "best": None, "guard": {}})  # these belong to the other run
        return checkpoint

    def check_unchanged(self) -> None:
        """Raise UserError if another process has written checkpoints since `find`."""
        steps = [step_of(path) for path in list_checkpoints(*self._search)]
        if newer := [step for step in steps if step > (self.newest or -1) and step not in self._damaged]:
            raise UserError(
                f"run.output_dir: another process has just trained to batch {newer[0]} in "
                f"{self._settings.output_dir}; re-run the same command to resume from there"
            )

    def due(self, step: int) -> bool:
        """Whether one is due after `step` batches: by `run.checkpoint_every`, `run.checkpoint_minutes` or `ask`. It
        stays due until one is written."""
        minutes = (time.monotonic() - self._written_at) / 60
        self._due |= step % self._settings.checkpoint_every == 0
        self._due |= minutes >= (self._settings.checkpoint_minutes or math.inf)
        return self._due

    def ask(self) -> None:
        """Make one due as soon as it can be."""
        self._due = True

    @property
    def idle(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._writing is None or self._writing[2].done()

    def hurry(self) -> None:
        """This process ends soon: from now on a checkpoint goes to the disk first, and to the bucket in one try."""
        self._hurried = True
        store.stop_retrying()

    def read(self, step: int) -> Checkpoint:
        """Tensors and metadata of a checkpoint that was kept.

        Raises:
            UserError: it is not there any more, or damaged.
        """
        copies = [path for path in list_checkpoints(*self._search) if step_of(path) == step]
        if not copies:
            raise UserError(f"the checkpoint of batch {step} is not there")
        checkpoint, damaged = read_whole_checkpoint(copies)
        if checkpoint is None:
            raise UserError(f"the checkpoint of batch {step}: {'; '.join(damaged.values())}")
        return checkpoint

    def go_back(self, steps: Sequence[int]) -> Checkpoint:
        """Read the first whole checkpoint of `steps`, and then delete all that are newer.

        Raises:
            UserError: none is whole, and nothing was deleted; or one cannot be deleted.
            OSError: a disk that does not answer, or a checkpoint that cannot be deleted.
        """
        self.settle()
        reasons = []
        for step in steps:
            try:
                checkpoint = self.read(step)
                break
            except UserError as error:
                reasons.append(str(error))
        else:
            raise UserError(f"no good checkpoint: {'; '.join(reasons) or 'none was kept'}")
        # newest first: whatever is left after a kill is older than the collapse, which is then found again
        for path in list_checkpoints(*self._search):
            if step_of(path) > step and step_of(path) not in self._damaged:
                delete_checkpoint(path)
        self.newest = step
        self._kept = frozenset(kept for kept in self._kept if kept <= step)
        return checkpoint

    def write(self, step: int, tensors: "Mapping[str, Tensor]", metadata: CheckpointMetadata) -> None:
        """Begin to write a checkpoint, in a thread; one that is still being written comes first.

        Args:
            tensors: copies of one's own, on the host.
            metadata: JSON-able; the best and the good checkpoint that it names are kept besides the newest.
        """
        self.settle()
        self._due, self._written_at = False, time.monotonic()
        kept = kept_besides(metadata)
        # those before are spared too, until the new ones are whole
        spared = self._damaged | kept | self._kept
        self._writing = step, kept, self._thread.submit(self._write, step, tensors, metadata, spared)

    def settle(self) -> bool:
        """Wait for the checkpoint that is being written and report what became of it; whether it is whole."""
        if self._writing is None:
            return False
        (step, kept, future), self._writing = self._writing, None
        failed = future.result()
        whole = len(failed) < len(self._places)
        if whole:
            self.newest = step
            self._damaged.discard(step)  # made again
            self._kept |= kept & {step}
            if kept <= self._kept:
                self._kept = kept
        if failed:
            taken = [redacted(place) for place in self._places if place not in failed]
            instead = f"it is in {taken[0]}" if whole else f"the newest is {self.describe()}"
            self._say(f"warning: the checkpoint of batch {step} is not saved: {'; '.join(failed.values())}; {instead}")
        return whole

    def describe(self) -> str:
        """The newest checkpoint, for messages."""
        return "none" if self.newest is None else f"that of batch {self.newest}"

    def _write(
        self, step: int, tensors: "Mapping[str, Tensor]", metadata: CheckpointMetadata, spared: Collection[int]
    ) -> dict[str, str]:
        """{place: why it did not take it}."""
        failed: dict[str, str] = {}
        hurried = self._hurried
        for place in reversed(self._places) if hurried else self._places:
            try:
                write_checkpoint(place, step, tensors, metadata, self._settings.keep_checkpoints, spared)
                if not hurried:
                    break
            except UserError as error:
                failed[place] = str(error)
            except OSError as error:
                failed[place] = f"{redacted(place)}: {error.strerror or error}"
            except Exception as error:  # memory for a copy, say: the training can do without this checkpoint
                failed[place] = f"{redacted(place)}: {type(error).__name__} {error}"
        return failed
