"""What holds for every test: its own working directory, no network, no store but its own.

The variables are set before anything is imported, because transformers, datasets and mlflow read some of them then.
"""

import os

import hypothesis
import pytest

_SET = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
# What the shell of whoever runs the tests may hold, and what a job of ours would obey.
_UNSET = (
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_TAGS",
    "MLFLOW_TRACKING_URI",
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
)

os.environ.update(_SET)
for _name in _UNSET:
    os.environ.pop(_name, None)

# The same cases each time, whatever the machine does meanwhile, and no database of failures.
hypothesis.settings.register_profile("tsp", database=None, deadline=None, derandomize=True)
# `make fuzz`: other cases each time, and many.
hypothesis.settings.register_profile("fuzz", database=None, deadline=None, max_examples=20_000, print_blob=True)
hypothesis.settings.load_profile("tsp")


@pytest.fixture(autouse=True)
def _leaves_no_store_behind():
    """A store that stays mlflow's default would be that of all tests to come, silently."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


@pytest.fixture(autouse=True)
def _own_working_directory(_leaves_no_store_behind, tmp_path, monkeypatch):
    """A job writes to `mlruns/` of its working directory: never to that of the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _errors_of_commands_are_raised(_leaves_no_store_behind, monkeypatch):
    """A rank that fails ends at once: here, behind an engine of another test, that would be the end of all tests."""
    monkeypatch.setattr("tsp.exits._joined", lambda: False)
