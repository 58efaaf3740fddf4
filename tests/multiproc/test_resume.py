"""Killed at once, launcher and ranks, and gone on with: nothing lost, nothing doubled, the same bytes."""

import json
import signal

import pytest

from tests.models import REPOSITORY, corpus_file, model_folder, sample, tiny_model
from tests.multiproc.test_job import SETTINGS

pytestmark = pytest.mark.multiproc

PRUNE = REPOSITORY / "launchers/prune.py"
KILLED = REPOSITORY / "tests/multiproc/killed_prune.py"
PRESET = {key: value for key, value in SETTINGS.items() if not key.startswith("stage1")} | {
    "prune.swap_rounds": 1,
    "state.every_steps": 2,
}


@pytest.fixture(scope="module")
def started(launch, tmp_path_factory):
    """Starts the job of this module with options of its own; in one store."""
    root = tmp_path_factory.mktemp("resume")
    model = tiny_model(num_layers=6)
    folder = model_folder(root / "tiny-model", model)
    text = corpus_file(root / "tiny-text.jsonl", sample(model, 160, 16))

    def start(output, *more, script=PRUNE, num_ranks=2, settings=PRESET):
        return launch(
            *(script, "--model", folder, "--data", text, "--num-drop", "2", "--no-register"),
            *("--output", root / output, "--experiment", "resume", *more),
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
            num_ranks=num_ranks,
            cwd=root,
        )

    start.root = root
    return start


@pytest.fixture(scope="module")
def client(started):
    from mlflow import MlflowClient

    from tsp.tracking.store import resolve_uri

    return MlflowClient(resolve_uri(started.root))


@pytest.fixture(scope="module")
def whole(started):
    """The folder of the job that nothing has disturbed."""
    done = started("whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return started.root / "whole"


def runs_of(client, output):
    runs = client.search_runs([client.get_experiment_by_name("resume").experiment_id])
    return [run for run in runs if run.data.tags["tsp.output"] == str(output)]


def points(client, run_id):
    """Step and value of all that the run was told, but for what depends on the clock."""
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith(("system/", "perf/"))]
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in names
        if "tokens_per_s" not in name and "speed" not in name
    }


@pytest.mark.parametrize(
    ("moment", "name", "code", "known"),
    [
        pytest.param("journal:2", "SIGKILL", -signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param("journal:2", "SIGINT", 130, 0, marks=pytest.mark.slow),
        pytest.param("stage2:3", "SIGKILL", -signal.SIGKILL, 2, marks=pytest.mark.slow),
        ("stage2:3", "SIGTERM", 143, 4),
        pytest.param("stage2:3", "SIGUSR1", 143, 4, marks=pytest.mark.slow),
        pytest.param("stage2:3", "SIGINT", 130, 4, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_job_goes_on_to_the_same_end(started, whole, client, moment, name, code, known, monkeypatch):
    output = f"{moment.replace(':', '-')}-{name}"
    monkeypatch.setenv("KILL_AFTER", moment)
    monkeypatch.setenv("KILL_SIGNAL", name)
    cut = started(output, script=KILLED)
    assert cut.returncode == code, cut.stderr[-3000:]
    assert not (started.root / output / "model").exists()
    if code > 0:
        assert cut.stderr.count("error: ") == 1
        [run] = runs_of(client, started.root / output)
        assert (run.info.status, name in run.data.tags["tsp.failure"]) == ("KILLED", True)

    done = started(output, "--resume", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "measurements of the run before are known" in done.stderr
    assert (f"stage2: the first {known} steps are known" in done.stderr) == (known > 0)
    expected, result = (json.loads((folder / "result.json").read_text()) for folder in (whole, started.root / output))
    assert result["dropped"] == expected["dropped"]
    assert result["perplexity"] == expected["perplexity"]
    name = "model/model.safetensors"
    assert (started.root / output / name).read_bytes() == (whole / name).read_bytes()

    [run] = runs_of(client, started.root / output)
    assert (run.info.run_id, run.info.status) == (result["run_id"], "FINISHED")
    assert run.data.tags["tsp.failure"] == ""
    assert run.data.tags["tsp.resumed"] == "yes"
    assert points(client, result["run_id"]) == points(client, expected["run_id"]), "none lost, none doubled"


@pytest.mark.slow
def test_with_nothing_to_go_on_with_it_starts_anew(started, whole, client):
    """The order of Slurm: the same line, the first time and after each interruption."""
    done = started("fresh", "--resume", "latest", num_ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--resume latest: no unfinished run of this job; it starts from the beginning" in done.stderr
    assert (started.root / "fresh/result.json").is_file()
    assert not list((started.root / "fresh/state").glob("*.safetensors")), "what is done needs none"
