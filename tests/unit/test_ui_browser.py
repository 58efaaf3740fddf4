"""What a person sees in MLflow's UI, in a real browser: gates, losses, the heatmap, the registered model."""

import functools
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest

from tests.models import free_port, model_folder, tiny_model
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.store import resolve_uri
from tsp.tracking.ui import site as running_site
from tsp.tracking.web import VIEW

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=60000",
    "--dump-dom",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The UI on a store with one run and one registered model: address, run id, experiment id."""
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    root = tmp_path_factory.mktemp("browser")
    tracker = start_run(root, experiment="seen", run_name="run-to-see", tags={}, params={})
    for step in range(3):
        gates = {f"stage1/gate/layer_{layer:03d}": 1 - 0.1 * step for layer in range(4)}
        tracker.metrics(gates | {"stage1/loss/total": 3.0 - step}, step)
    tracker.image(np.zeros((8, 8, 3)), key="gates/heatmap", step=0)
    checkpoint = model_folder(root / "model", tiny_model(num_layers=2))
    registering = {"run_id": tracker.run_id, "tags": {"dropped": "1,3"}, "description": "", "metadata": {}}
    register_checkpoint(resolve_uri(root), checkpoint, "model-to-see", **registering)
    tracker.finish("FINISHED")
    port = free_port()
    with running_site(root / "mlruns" / "mlflow.db", port):
        yield f"http://127.0.0.1:{port}/#", tracker.run_id, tracker.experiment_id


@pytest.fixture
def page(site, tmp_path):
    """The text of a page's document after its scripts have run."""

    @functools.cache
    def load(path: str) -> str:
        url = site[0] + urllib.parse.quote(path) + VIEW
        done = subprocess.run(
            [BROWSER, *QUIET, f"--user-data-dir={tmp_path}/profile", url], capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return load


def test_charts_of_gates_and_losses_and_the_heatmap(site, page):
    _, run_id, experiment_id = site
    charts = page(f"/experiments/{experiment_id}/runs/{run_id}/model-metrics")
    for shown in ("run-to-see", "stage1/gate", "stage1/loss", "gates"):
        assert shown in charts


def test_the_registered_model_with_what_was_dropped(page):
    assert "model-to-see" in page("/models")
    version = page("/models/model-to-see")
    assert "Version 1" in version
    assert "1,3" in version
