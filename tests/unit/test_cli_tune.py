"""`tsp tune` as a command: what it hands on, refuses before anything starts, and prints."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.models import REPOSITORY
from tsp import cli_tune
from tsp.cli import main
from tsp.cli_tune import launched_tune, tune
from tsp.report_tune import print_search

pytest.importorskip("optuna")


@pytest.fixture
def started(monkeypatch):
    """Instead of starting `deepspeed`, keep its command line."""
    # What only starts it needs no torch, which takes seconds to import.
    monkeypatch.setitem(sys.modules, "torch", None)
    commands = []
    monkeypatch.setattr(cli_tune, "run_passing_signals", lambda command, **kwargs: commands.append(command) or 7)
    return commands


def options_of(*words):
    return launched_tune.make_context("tune", list(words)).params


def test_the_command_and_its_launcher_take_the_same_options():
    of_command, of_launcher = ({parameter.name for parameter in command.params} for command in (tune, launched_tune))
    assert of_command - of_launcher == {"nproc", "hostfile", "include", "master_port"}
    assert of_launcher - of_command == {"local_rank", "document"}
    assert {"register", "no_register", "output"}.isdisjoint(of_command), "nothing is saved"


def test_the_launcher_is_started_with_the_same_options(started):
    Path("s p.yaml").write_text("stage2.lr: [1e-3, 1e-2]")
    words = ["--minutes", "3", "--trials", "5", "--space", "s p.yaml", "--best", "b.yaml", "--set", "stage2.steps=3"]
    done = CliRunner().invoke(main, ["tune", "--nproc", "2", *words, "--seed", "3", "--json"])
    assert (done.exit_code, done.stdout) == (7, "")
    [command] = started
    assert command[3:6] == ["--num_accelerators", "2", str(REPOSITORY / "launchers" / "tune.py")]
    assert command[-2] == "--document"
    handed, given = options_of(*command[6:-2]), options_of(*words, "--seed", "3", "--json")
    assert handed == given


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--ratio", "0.25,0.5"], "tsp tune searches one job, got several by prune.ratio"),
        (["--space", "none.yaml"], "--space none.yaml: No such file"),
        (["--space", "bad.yaml"], "unknown key stage2.lrr, did you mean lr?"),
        (["--set", "transfer=none"], "transfer none has no setting to search"),
        (["--minutes", "0"], "--minutes"),
        (["--output", "out"], "No such option"),
    ],
)
def test_wrong_input_starts_nothing(started, words, reason):
    Path("bad.yaml").write_text("stage2.lrr: [1, 2]")
    done = CliRunner().invoke(main, ["tune", *words])
    assert done.exit_code == 2
    assert reason in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not started


def test_without_optuna_it_says_what_to_install(started, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = CliRunner().invoke(main, ["tune"])
    assert (done.exit_code, done.stderr) == (2, "error: tsp tune needs Optuna: pip install 'tsp[tune]'\n")
    assert not started


def test_dry_run_prints_the_space_and_the_job_and_makes_nothing():
    words = [sys.executable, "-m", "tsp", "tune", "--dry-run"]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["space"]["stage2.lr_scale"] == "0.5 to 8 (log)"
    assert printed["config"]["data"]["tuning_blocks"] == 32
    assert list(Path.cwd().iterdir()) == []


def test_the_best_trials_stand_on_top():
    common = {"state": "complete", "seconds": 61.0, "reason": None, "run_id": "r"}
    trials = [
        common | {"number": 0, "preset": True, "settings": {}, "loss": 2.5},
        common | {"number": 1, "preset": False, "settings": {"stage2.lr": 4e-3, "stage2.gates": "off"}, "loss": 2.4},
        common
        | {"number": 2, "preset": False, "settings": {"stage2.lr": 1.0}, "loss": None, "state": "pruned"}
        | {"reason": "behind the median after step 5"},
    ]
    document = {
        "trials": trials,
        "space": {"stage2.lr": "0.0002 to 0.005 (log)", "stage2.gates": "off, anneal"},
        "preset": {"stage2.lr": 0.001, "stage2.gates": "off"},
        "loss": {"dense": 2.0, "bare_drop": 3.0, "preset": 2.5, "best": 2.4},
        "tuning_blocks": 32,
        "config": str(Path.cwd() / "my tuned.yaml"),
    }
    stdout = io.StringIO()
    print_search(json.loads(json.dumps(document)), "http://run", stdout)
    text = stdout.getvalue()
    assert "3 trials (2 complete, 1 pruned), the best first" in text
    assert text.index("0.004") < text.index("preset 0") < text.index("0.001")
    assert "dense 2.0000, without the layers 3.0000, preset 2.5000, best 2.4000" in text
    assert "trial 2 pruned: behind the median after step 5" in text
    assert "tsp prune --config 'my tuned.yaml'" in text
