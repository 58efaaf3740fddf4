"""Training states: what a stage has learned up to a step, on disk, so that a job that goes on need not learn it again.

    known = states.last("stage2", question)         # None: from the first step
    for step in steps:
        states.after("stage2", question, step, number, tensors, about)

A state is one safetensors file, `<number>-<stage>-<question>-<sum>.safetensors`, written by rank 0 under another name,
synced and renamed. The sum is 16 digits of its sha256: one whose bytes give it is whole. It does not depend on the
number of ranks, and has no weight that is not trained. The last two of each question are kept: a job asks more than
one, of both stages and of each number of layers that it tries, and their step numbers need not ascend.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tsp.errors import StorageError
from tsp.files import require_room, sha256, sync
from tsp.ranks import Ranks
from tsp.settings import StateConfig
from tsp.training import StepStats

if TYPE_CHECKING:
    from tsp.engine import Engine

log = logging.getLogger("tsp")

KEPT = 2
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Tensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class State:
    """A stage after some of its steps."""

    step: int
    """The step to go on with."""
    tensors: Mapping[str, Tensor]
    """On the CPU, the same on every rank; to be asked for on all of them alike."""
    about: dict[str, Any]
    seconds: float
    """Of training, from the first step to here."""


class _Found(NamedTuple):
    """A file that is whole."""

    path: Path
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype by name."""
    told: dict[str, Any]


class _Told(Mapping[str, Tensor]):
    """Tensors of a file that rank 0 reads one at a time: all of them are 12 bytes for each weight that is trained."""

    def __init__(self, ranks: Ranks, found: _Found) -> None:
        self._ranks, self._found = ranks, found

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        def read() -> Tensor:
            with safe_open(self._found.path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor

        return self._ranks.tensor_from_first(read, *self._found.tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self._found.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.tensors)

    def __len__(self) -> int:
        return len(self._found.tensors)


class States:
    """The training states of a job; the same calls on every rank."""

    def __init__(
        self,
        engine: "Engine | None" = None,
        folder: Path | None = None,
        job: str = "",
        config: StateConfig | None = None,
    ) -> None:
        """Without arguments nothing is known and nothing kept.

        Args:
            engine: tells the other ranks what rank 0 has read.
            folder: made with the first state.
            job: a part of every question.
            config: how often.
        """
        self._engine = engine
        self._folder = folder
        self._job = job
        self._config = config or StateConfig()
        self._seconds = 0.0
        self.known_s = 0.0
        """Seconds of training, by runs before, in all that `last` has found."""
        self._spent_s = 0.0
        """Those of the stage at hand so far."""

    def last(self, stage: str, question: Mapping[str, Any]) -> State | None:
        """The newest whole state that answers just this question of just this job.

        Args:
            stage: `stage1` or `stage2`.
            question: all that it depends on and that the job's settings do not say; JSON.
        """
        if self._engine is None or self._folder is None:
            return None
        folder, kind = self._folder, self._kind(stage, question)
        found: _Found | None = self._engine.on_first(lambda: _newest(folder, kind))
        state = State(tensors=_Told(self._engine, found), **found.told) if found else None
        self._spent_s = state.seconds if state else 0.0
        self.known_s += self._spent_s
        if state is not None and self._engine.is_first:
            log.info("%s: the first %d steps are known from the run before", stage, state.step)
        return state

    def after(
        self,
        stage: str,
        question: Mapping[str, Any],
        stats: StepStats,
        number: int,
        tensors: Callable[[], Tensors],
        about: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Behind each step: keep the state if that is due, or if the job is about to be interrupted.

        Args:
            stage: as for `last`.
            question: as for `last`.
            stats: of the step.
            number: ascending over the steps that answer the question.
            tensors: gives what is to be kept, the same on every rank; called on every rank.
            about: gives what else is to be kept; JSON.
        """
        if self._engine is None or self._folder is None:
            return
        self._seconds += stats.seconds  # The same on every rank.
        self._spent_s += stats.seconds
        every = self._config.every_steps
        due = self._seconds >= 60 * self._config.every_minutes or (every and (stats.step + 1) % every == 0)
        if not (due or stats.interrupted):
            return
        self._seconds = 0.0
        kept = {}
        for name, tensor in tensors():
            if self._engine.is_first:
                kept[name] = tensor.detach().cpu()
        if self._engine.is_first:
            told = {"step": stats.step + 1, "about": dict(about()), "seconds": self._spent_s}
            _write(self._folder, number, self._kind(stage, question), kept, told)

    def forget(self, stage: str, question: Mapping[str, Any]) -> None:
        """Remove those that answer this question: nobody will go on from there.

        Args:
            stage: as for `last`.
            question: as for `last`.
        """
        self._remove(self._kind(stage, question))

    def clear(self) -> None:
        """Remove all of them: the job has finished."""
        self._remove("stage*")

    def _remove(self, kind: str) -> None:
        if self._engine is not None and self._folder is not None and self._engine.is_first:
            _remove_unfinished(self._folder)
            for path in _files(self._folder, kind):
                _unlink(path)

    def _kind(self, stage: str, question: Mapping[str, Any]) -> str:
        asked = json.dumps([self._job, stage, question], sort_keys=True)
        return f"{stage}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"


def _files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*-{kind}-*.safetensors"))


def _remove_unfinished(folder: Path) -> None:
    """What a run has left that was killed while it wrote."""
    for path in folder.glob("*-stage*.tmp"):
        _unlink(path)


def _unlink(path: Path) -> None:
    with suppress(OSError):  # One that stays takes up room, and no more.
        path.unlink()


def _newest(folder: Path, kind: str) -> _Found | None:
    from safetensors import safe_open

    for path in reversed(_files(folder, kind)):
        if sha256(path)[:16] != path.stem.rpartition("-")[2]:
            log.warning("%s is damaged; an earlier state is looked for", path)
            continue
        with safe_open(path, "pt") as file:
            tensors = {name: _about(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118  It is no dict.
            return _Found(path, tensors, json.loads(file.metadata()["told"]))
    return None


def _about(part: Any) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(part.get_shape()), _DTYPES[part.get_dtype()]


def _write(folder: Path, number: int, kind: str, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    """What goes wrong here costs a warning: the earlier states are whole, and the job goes on."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = folder / f"{number:08d}-{kind}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        require_room(folder, sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, temporary, {"told": json.dumps(told)})
        sync(temporary)
        written = folder / f"{temporary.stem}-{sha256(temporary)[:16]}.safetensors"
        os.replace(temporary, written)
        sync(folder)
        # Later ones are damaged: the training would have gone on from there.
        earlier = [path for path in _files(folder, kind) if path.name[:8] < written.name[:8]]
        for path in set(_files(folder, kind)) - {written, *earlier[1 - KEPT :]}:
            path.unlink()
    except (OSError, SafetensorError, StorageError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        log.warning("the training state was not kept in %s (%s); the job goes on", folder, error)
