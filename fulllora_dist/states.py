"""The states of one run, as rank 0 keeps them: the newest is found, others are written beside the training."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from fulllora_dist.config import RunSettings
from fulllora_dist.data import urls
from fulllora_dist.distributed.checkpoint import DamagedState, read_newest_state, read_state, write_state
from fulllora_dist.errors import UserError


def state_places(settings: RunSettings) -> list[str]:
    """Folders or URLs where a run's states may lie; each takes those that the ones before it refuse."""
    own = os.path.join(settings.output, "states")
    if settings.states is None:
        return [own]
    return [settings.states, own] if urls.is_remote(settings.states) else [settings.states]


class States:
    """Finds and writes states; used on rank 0 alone.

    They lie under `run.states`, or in the output folder. Where a bucket refuses one, it goes to the output folder, and
    is found there by whoever starts again with the same disk. A state that nothing takes costs a warning: the training
    goes on, and older states are as they were.

    Attributes:
        newest: step of the newest state that is whole, None where there is none.
    """

    def __init__(self, settings: RunSettings, say: Callable[[str], None]):
        self._settings, self._say = settings, say
        self._places = state_places(settings)
        self.newest: int | None = None
        self._thread = ThreadPoolExecutor(1, "states")
        self._writing: tuple[int, Future[list[str]]] | None = None

    def find(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The run's own newest whole state, else the one it was told to start from, else None.

        Raises:
            UserError: a bucket that does not answer, or a given state that is damaged.
        """
        found, damaged = read_newest_state(*self._places)
        for line in damaged:
            self._say(f"warning: {urls.redacted(line)}; going on from an older state")
        if found is not None:
            self.newest = found[1]["step"]
        elif self._settings.resume_from is not None:
            try:
                found = read_state(self._settings.resume_from)
            except DamagedState as error:
                raise UserError(f"run.resume_from: {error}") from None
            found[1]["mlflow_run_id"] = None  # that run goes on elsewhere
        return found

    @property
    def idle(self) -> bool:
        """Whether no state is being written."""
        return self._writing is None or self._writing[1].done()

    def write(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Begin to write a state, in a thread; one that is still being written comes first.

        Args:
            tensors: copies of one's own, on the host.
        """
        self.settle()
        self._writing = step, self._thread.submit(self._write, step, tensors, facts)

    def settle(self) -> bool:
        """Wait for the state that is being written and report what became of it; whether it is whole."""
        if self._writing is None:
            return False
        (step, future), self._writing = self._writing, None
        failed = future.result()
        whole = len(failed) < len(self._places)
        if whole:
            self.newest = step
        if failed:
            instead = f"it is in {self._places[-1]}" if whole else f"the newest is {self.described()}"
            self._say(f"warning: the state of batch {step} is not saved: {'; '.join(failed)}; {instead}")
        return whole

    def described(self) -> str:
        """The newest state, for people."""
        return "none" if self.newest is None else f"that of batch {self.newest}"

    def _write(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> list[str]:
        """Why each place before the one that took it did not."""
        failed = []
        for place in self._places:
            try:
                write_state(place, step, tensors, facts, self._settings.keep_states)
                break
            except UserError as error:
                failed.append(str(error))
            except OSError as error:
                failed.append(f"{urls.redacted(place)}: {error.strerror or error}")
        return failed
