"""A working directory with a tiny model, jobs in it, and what its store holds of them afterwards."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models import REPOSITORY, corpus_file, model_folder, sample, tiny_model
from tsp.fresh import LAUNCHER_VARIABLES

SETTINGS = {
    "data.block_tokens": 16,
    "eval.block_tokens": 16,
    "eval.speed_runs": 0,
    "eval.prompts": 0,
    "train.batch_size": 8,
    "prune.swap_rounds": 1,
    "stage1.schedule": "budget",
    "stage1.steps": 14,
    "stage1.lr": 0.1,
    "stage2.steps": 8,
    "stage2.lora.rank": 4,
    "state.every_steps": 2,
}
EXPERIMENT = "chaos"
REGISTERED = "chaos-model"
_BY_THE_CLOCK = ("system/", "perf/")


class World:
    """Where jobs run, are cut off and go on."""

    def __init__(self, root: Path, uri: str | None = None) -> None:
        """Make the model and its text.

        Args:
            root: working directory, empty.
            uri: tracking server; None: the embedded store.
        """
        self.root, self.uri = root, uri
        model = tiny_model(num_layers=6)
        self.model = model_folder(root / "tiny-model", model)
        self.text = corpus_file(root / "tiny-text.jsonl", sample(model, 160, 16))

    def start(self, output: str, *, register: bool = True) -> "Job":
        """One life of the job that writes into a folder; the line that a scheduler would repeat."""
        words = [sys.executable, REPOSITORY / "launchers/prune.py", "--model", self.model, "--data", self.text]
        words += ["--num-drop", "2", "--output", output, "--resume", "latest", "--experiment", EXPERIMENT]
        words += ["--register", REGISTERED] if register else ["--no-register"]
        words += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        return Job(self.spawn(words, self.root / f"{output}.err"), self.root / f"{output}.err")

    def spawn(self, words: list[Any], log: Path) -> subprocess.Popen:
        """A process of this world, in a session of its own; its stderr goes to the end of a file."""
        dropped = LAUNCHER_VARIABLES | {"MLFLOW_RUN_ID"}
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        environment |= {"MLFLOW_TRACKING_URI": self.uri} if self.uri else {}
        with log.open("ab") as stderr:
            return subprocess.Popen(
                [str(word) for word in words],
                cwd=self.root,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def checkpoint(self, output: str) -> str:
        """Hash of the pruned weights."""
        return hashlib.sha256((self.root / output / "model" / "model.safetensors").read_bytes()).hexdigest()

    def runs(self, output: str) -> list[Any]:
        """The runs whose folder this is, as the store has them."""
        client = self.client()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        found = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
        return [run for run in found if run.data.tags.get("tsp.output") == str(self.root / output)]

    def points(self, run: Any) -> Mapping[str, list[tuple[int, float]]]:
        """Step and value of all that a run was told, but for what depends on the clock."""
        client = self.client()
        return {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if not name.startswith(_BY_THE_CLOCK) and "per_s" not in name
        }

    def versions(self) -> Counter[str]:
        """How many versions each run has registered."""
        found = self.client().search_model_versions(f"name = '{REGISTERED}'", max_results=1000)
        return Counter(version.run_id for version in found)

    def client(self) -> Any:
        from mlflow import MlflowClient

        from tsp.tracking.store import resolve_uri

        return MlflowClient(self.uri or resolve_uri(self.root))


class Job:
    """A process that may be cut off."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def wait(self, timeout_s: float = 300) -> int:
        return self.process.wait(timeout_s)

    def cut_off_after(self, seconds: float, number: int) -> bool:
        """Send the signal to the whole process group then; whether it was still alive."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, number)
            self.process.wait(60)
            return True
        return False


def differences(expected: Mapping[str, list], found: Mapping[str, list]) -> tuple[int, int]:
    """Points that are lost (or have another value), and points that are there twice."""
    lost = sum(len(set(points) - set(found.get(name, []))) for name, points in expected.items())
    doubled = sum(len(points) - len({step for step, _ in points}) for points in found.values())
    return lost, doubled


def until(condition: Any, seconds: float) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.5)
    return bool(condition())
