"""The walk of `docs/promotion_walk.sh`: real jobs, real decisions, and what MLflow itself says of them afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.models import REPOSITORY

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder of the walk, and all that it has printed."""
    root = tmp_path_factory.mktemp("walk")
    bin_folder = Path(sys.executable).parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        ["bash", str(REPOSITORY / "docs" / "promotion_walk.sh")],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return root, done.stdout


def test_every_decision_is_a_run(walked):
    root, _ = walked
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("walk/promotions")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    decided = [(run.data.tags["alias"], run.data.tags["version"], run.data.tags["decision"]) for run in runs]
    assert decided == [
        ("champion", "1", "accepted"),
        ("champion", "2", "refused"),
        ("pilot", "2", "accepted"),
        ("champion", "2", "accepted"),
        ("champion", "1", "accepted"),
        ("champion", "1", "accepted"),
    ]
    assert [run.data.tags["kind"] for run in runs].count("rollback") == 1
    assert runs[1].data.metrics["ppl_ratio"] > 1.15
    assert runs[3].data.tags["reason"] == "speed counts more, agreed on Monday"


def test_the_aliases_are_where_the_last_decisions_left_them(walked):
    root, _ = walked
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    aliases = {name: str(version) for name, version in client.get_registered_model("walk").aliases.items()}
    assert aliases == {"champion": "1", "pilot": "2", "previous_champion": "2"}
    assert client.get_model_version("walk", "2").tags["dropped"] == "3,9,12,13"


def test_refusals_and_a_moved_alias_end_with_3_and_the_champion_is_exported(walked):
    root, printed = walked
    assert printed.count("(exit code 3)") == 3
    assert "somebody moved it by hand" in printed
    assert (root / "champion" / "model.safetensors").stat().st_size > 1_000_000
