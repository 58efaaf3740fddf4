"""A job that is checked and ready to run: what can be found wrong is found before anything is opened or written.

    job = prepare(config, ds_path, output, root=Path.cwd(), world_size=1)

The jobs of a sweep are prepared by one `Preparation`, which opens each model and corpus once.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tsp import selection
from tsp.config import JobConfig, number_to_drop
from tsp.data import Corpora, Corpus, load_corpora
from tsp.evaluation.generation_speed import check_fits
from tsp.evaluation.zero_shot import Tasks, open_tasks
from tsp.files import require_new
from tsp.machine import is_first_node, require_restorable, weights_dtype
from tsp.masking import masked
from tsp.methods import TRANSFERS
from tsp.plan import Plan, make_plan
from tsp.quantize import check_quantizable
from tsp.sharding import read_json, resolve
from tsp.source import Source, check_drop, load_tokenizer, open_source
from tsp.tracking.fetch import located


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked job, ready to run."""

    config: JobConfig
    sharding: dict[str, Any]
    source: Source
    calibration: Corpus
    tuning: Corpus | None
    """On which settings are compared."""
    evals: list[Corpus]
    tasks: Tasks | None
    plan: Plan
    output: Path | None
    command: str
    varied: dict[str, Any] = field(default_factory=dict)
    """What a sweep varies, by dotted key, and the values here; empty: a job of its own."""
    trace_to: int = 0
    """The largest number of layers that a job of the sweep with the same selection drops."""

    @property
    def num_drop(self) -> int:
        assert self.plan.num_drop is not None, "known, or found by now"
        return self.plan.num_drop

    def dropping(self, num_drop: int) -> "Job":
        """The same job with its number of layers known."""
        plan = replace(self.plan, num_drop=num_drop)
        return replace(self, plan=plan, trace_to=max(self.trace_to, num_drop))

    @property
    def candidates(self) -> list[int]:
        """Layers that may go."""
        return [index for index in range(self.source.num_layers) if index not in self.protected]

    @property
    def protected(self) -> frozenset[int]:
        """Layers that stay: those the user protects, and those without which others cannot run."""
        return _protected(self.config, self.source)

    @property
    def corpora(self) -> list[Corpus]:
        """All text: to calibrate on, set aside for tuning, to evaluate on."""
        return [corpus for corpus in (self.calibration, self.tuning, *self.evals) if corpus is not None]

    @property
    def hash(self) -> str:
        """16 hex digits that two jobs share if they do the same: settings, model files and texts, but not the names."""
        settings = self.config.model_dump(mode="json", exclude={"state", "tracking"})
        given = [path for path in self.source.folder.iterdir() if path.is_file()]
        if self.config.eval.slices:
            given.append(Path(self.config.eval.slices))
        if self.config.eval.task_folder:
            given += sorted(Path(self.config.eval.task_folder).rglob("*.yaml"))
        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in given)
        corpora = [corpus.fingerprint for corpus in self.corpora]
        return hashlib.sha256(json.dumps([settings, files, corpora]).encode()).hexdigest()[:16]


class Preparation:
    """Makes jobs; the models and corpora that several jobs name are opened once."""

    def __init__(self, ds_path: Path, *, root: Path, world_size: int) -> None:
        """Read the DeepSpeed JSON.

        Args:
            ds_path: DeepSpeed JSON.
            root: working directory; the registry of `models:/...` is the one of its store.
            world_size: ranks.
        """
        self._content = read_json(ds_path)
        self._root = root
        self._world_size = world_size
        self._sources: dict[str, Source] = {}
        self._texts: dict[str, tuple[Corpora, Tasks | None]] = {}
        self._droppable: set[tuple[str, tuple[int, ...]]] = set()

    def job(self, config: JobConfig, output: Path | None, varied: dict[str, Any] | None = None) -> Job:
        """Check config, DeepSpeed JSON, model files and corpora.

        Args:
            config: of the job.
            output: folder to make; None: below `mlruns/`.
            varied: what the sweep varies, and the values of this job.

        Raises:
            TspError: with exit code 2; nothing has been opened or written.
        """
        source = self._source(config)
        self._check_layers(config, source)
        if config.quantize:
            check_quantizable(source)
        dtype = weights_dtype(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        hidden_size = source.config.get_text_config(decoder=True).hidden_size
        sharding = resolve(self._content, config, world_size=self._world_size, hidden_size=hidden_size, dtype=dtype)
        _check_restorable(config, sharding)
        check_fits(config.eval, source.max_positions)
        corpora, tasks = self._open_texts(config, source)
        plan = make_plan(
            config,
            source,
            corpora.calibration,
            corpora.evals,
            world_size=self._world_size,
            zero_stage=sharding["zero_optimization"]["stage"],
            bytes_per_weight=dtype.itemsize,
        )
        return Job(
            config=config,
            sharding=sharding,
            source=source,
            calibration=corpora.calibration,
            tuning=corpora.tuning,
            evals=corpora.evals,
            tasks=tasks,
            plan=plan,
            output=output,
            command=masked(" ".join(sys.argv)),
            varied=varied or {},
            trace_to=0 if config.prune.drop is not None else plan.num_drop or 0,
        )

    def _source(self, config: JobConfig) -> Source:
        key = config.model.model_dump_json()
        if key not in self._sources:
            self._sources[key] = open_source(located(config.model, self._root))
        return self._sources[key]

    def _open_texts(self, config: JobConfig, source: Source) -> tuple[Corpora, Tasks | None]:
        key = json.dumps(config.model_dump(mode="json", include={"model", "data", "eval"}))
        if key not in self._texts:
            tokenizer = load_tokenizer(source)
            corpora = load_corpora(config, tokenizer, source.max_positions)
            self._texts[key] = (corpora, open_tasks(config.eval, tokenizer, source.max_positions))
        return self._texts[key]

    def _check_layers(self, config: JobConfig, source: Source) -> None:
        num_drop = number_to_drop(config.prune, source.num_layers)
        if num_drop is None:
            # Any number that is tried is checked then; one layer at least has to be able to go.
            num_drop = 1
        dropped = config.prune.drop
        if num_drop == 0:
            return
        if dropped is not None and TRANSFERS[config.transfer].folds:
            selection.runs_after_kept(dropped, config.transfer)
        if dropped is None:
            candidates = [index for index in range(source.num_layers) if index not in _protected(config, source)]
            selection.cut(candidates, num_drop)
            # It is not known yet which will go; a model that cannot lose just any is refused now.
            dropped = selection.spread(candidates, num_drop)
        key = (config.model.model_dump_json(), tuple(dropped))
        if key not in self._droppable:
            check_drop(source, dropped)
            self._droppable.add(key)


def prepare(
    config: JobConfig, ds_path: Path, output: Path | None, *, root: Path, world_size: int, resume: bool = False
) -> Job:
    """Check a single job; see `Preparation.job`. Whose folder `output` is, is seen later of one that goes on."""
    preparation = Preparation(ds_path, root=root, world_size=world_size)
    if output is not None and not resume and is_first_node():
        require_new(output)
    return preparation.job(config, output)


def inputs_of(*jobs: Job) -> dict[str, Any]:
    """What all nodes have to have alike, by name. Two copies of a file have two dates, but one name and size."""
    files = {path for job in jobs for path in job.source.folder.iterdir() if path.suffix in (".json", ".safetensors")}
    return {
        "settings": [(job.config.model_dump(mode="json"), job.sharding) for job in jobs],
        "model files": sorted((path.name, path.stat().st_size) for path in files),
        "texts": [corpus.fingerprint for job in jobs for corpus in job.corpora],
    }


def _check_restorable(config: JobConfig, sharding: Mapping[str, Any]) -> None:
    """Of what puts weights back within one job, see `Engine.restored`."""
    if config.prune.method == "laco" and config.prune.drop is None:
        require_restorable(sharding, "prune.method laco", "give another method")
    if config.prune.max_ppl_ratio is not None and config.transfer != "none":
        require_restorable(sharding, "prune.max_ppl_ratio", "give prune.num_drop")


def _protected(config: JobConfig, source: Source) -> frozenset[int]:
    ends = selection.protected_layers(source.num_layers, config.prune.protect_first, config.prune.protect_last)
    return ends | source.read_by_others
