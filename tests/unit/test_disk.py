"""Disks that are full or read-only: a clear error, what was there stays, nothing half-written."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager, nullcontext

import pytest
import torch
from mlflow import MlflowClient

from tests.models import REPOSITORY, bench, corpus_file, job, model_folder, sample, tiny_model, tokens
from tsp.checkpoint import load
from tsp.config import ModelConfig
from tsp.errors import ModelError, StorageError
from tsp.files import require_room, sha256
from tsp.journal import Journal
from tsp.methods.trsp.stage2 import transfer
from tsp.settings import StateConfig
from tsp.source import open_source
from tsp.states import States
from tsp.tracking import run
from tsp.tracking.run import start_run

SETTINGS = {"stage2__lr": 0.02, "stage2__steps": 4}


class Disk:
    """A file system of a size of its own."""

    def __init__(self, place, size):
        self.place = place
        place.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)

    def remount(self, options):
        self._mount("-o", f"remount,{options}", self.place)

    def fill(self):
        """To the last byte."""
        with (self.place / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                return

    def close(self):
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)

    def _mount(self, *words):
        subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """Makes one."""
    made = []

    def make(size):
        try:
            made.append(Disk(tmp_path / f"disk-{len(made)}", size))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a file system cannot be mounted here: {error}")
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_room_is_seen_before_it_is_needed(disk):
    small = disk("1m")
    require_room(small.place / "new" / "folder", 1_000_000)
    with pytest.raises(StorageError, match=r"needs 2 GiB, 0.0009\d+ GiB are free"):
        require_room(small.place / "new" / "folder", 2**31)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_without_room_for_a_state_the_job_goes_on_and_the_earlier_one_is_whole(disk, how, caplog):
    small, spoilt = disk("8m"), []
    made = bench(tiny_model(num_layers=4), tokens(16, 16), job(**SETTINGS))
    made.states = States(made.engine, small.place, "one", StateConfig(every_steps=2))

    def after_step(stage, stats, gates):
        if stats.step == 3:
            spoilt.extend(small.place.glob("*.safetensors"))
            small.fill() if how == "full" else small.remount("ro")

    made.after_step = after_step
    transfer(made, (1, 2), save_dtype=torch.float32)
    assert made.transfer_steps == SETTINGS["stage2__steps"]
    assert "the training state was not kept" in caplog.text
    [kept] = small.place.glob("*.safetensors")
    assert spoilt == [kept]
    assert not list(small.place.glob("*.tmp"))

    again = bench(tiny_model(num_layers=4), tokens(16, 16), job(**SETTINGS))
    again.states = States(again.engine, small.place, "one", StateConfig(every_steps=2))
    seen = []
    again.after_step = lambda stage, stats, gates: seen.append(stats.step)
    transfer(again, (1, 2), save_dtype=torch.float32)
    assert seen == [2, 3]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_without_room_for_the_journal_the_job_goes_on(disk, how, caplog):
    small = disk("64k")
    path = small.place / "state" / "journal.jsonl"
    path.parent.mkdir()
    journal = Journal("job", (), path)
    journal.once({"n": 1}, lambda: [1.0])
    small.fill() if how == "full" else small.remount("ro")
    for number in range(2, 2000):
        assert journal.once({"n": number}, lambda number=number: [float(number)]) == [float(number)]
    assert caplog.text.count("the job goes on without it") == 1


def test_a_full_store_makes_nobody_wait_and_loses_nothing(disk, tmp_path, monkeypatch, caplog):
    small = disk("8m")
    store = f"sqlite:///{small.place}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracker = start_run(tmp_path, experiment="full", run_name=None, tags={}, params={})
    small.fill()
    started = time.monotonic()
    for step in range(500):
        tracker.metrics({"loss": step / 3}, step)
    assert time.monotonic() - started < 1
    while "records wait on disk" not in caplog.text:
        assert time.monotonic() - started < 60, "the store took everything"
        time.sleep(0.1)
    (small.place / "filler").unlink()
    tracker.finish("FINISHED")
    client = MlflowClient(store)
    points = sorted((point.step, point.value) for point in client.get_metric_history(tracker.run_id, "loss"))
    assert points == [(step, step / 3) for step in range(500)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@contextmanager
def locked(database):
    """Another process writes to it and does not end."""
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize("how", ["room again", "full to the end", "full and the store locked"])
def test_points_for_which_the_spool_has_no_room_wait(disk, tmp_path, monkeypatch, caplog, capsys, how):
    small, store = disk("64k"), tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    tracker = start_run(small.place, experiment="full", run_name=None, tags={}, params={})
    with locked(store):
        small.fill()
        for step in range(2000):
            tracker.metrics({"loss": step / 3}, step)
        assert caplog.text.count("records wait in memory") == 1
        [spool] = small.place.glob("mlruns/spool/*.jsonl")
        assert spool.read_bytes().endswith(b"\n"), "no torn line"
        if how == "room again":
            (small.place / "filler").unlink()
            small.remount("size=8m")
        if how == "full and the store locked":
            monkeypatch.setattr(run, "DRAIN_S", 0.0)
            tracker.finish("FINISHED")
            assert "for which the disk had no room are lost" in capsys.readouterr().err
            return
        tracker.metrics({"loss": 2000 / 3}, 2000)
    tracker.finish("FINISHED")
    client = MlflowClient(f"sqlite:///{store}")
    points = sorted((point.step, point.value) for point in client.get_metric_history(tracker.run_id, "loss"))
    assert points == [(step, step / 3) for step in range(2001)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert not list(small.place.glob("mlruns/spool/*.jsonl"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A small job, but for the folder that it writes to."""
    place, model = tmp_path_factory.mktemp("job"), tiny_model(num_layers=6)
    folder, text = model_folder(place / "model", model), corpus_file(place / "text.jsonl", sample(model, 160, 16))
    given = ["--model", folder, "--data", text, "--num-drop", "2", "--no-register", "--resume", "latest"]
    few = ("eval.prompts=0", "eval.speed_runs=0", "stage2.lr=0.02", "stage2.steps=4")
    for setting in ("data.block_tokens=16", "eval.block_tokens=16", *few):
        given += ["--set", setting]
    return given


def run_job(words, place, output, **environment):
    command = [sys.executable, REPOSITORY / "launchers/prune.py", *words, "--output", output]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([*map(str, command)], cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def error_line(done):
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(line) <= 200
    return line


@pytest.mark.slow
def test_a_checkpoint_without_room_is_an_error_and_with_room_the_job_goes_on(disk, words, tmp_path):
    small = disk("120k")
    output = small.place / "out"
    assert "GiB are free there" in error_line(run_job(words, tmp_path, output))
    assert not list(output.rglob("*.safetensors"))

    small.remount("size=200k")  # For the checkpoint, not for the figures.
    assert "No space left on device; mend that" in error_line(run_job(words, tmp_path, output))
    assert not (output / "result.json").exists()

    small.remount("size=4m")
    done = run_job(words, tmp_path, output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (output / "model" / "model.safetensors").is_file()
    assert (output / "result.json").is_file()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Environment variables for a disk with faults below a folder."""
    compiler, library = shutil.which("cc"), tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    source = REPOSITORY / "tests/unit/faulty_disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return lambda folder, **faults: {"LD_PRELOAD": str(library), "FAULTY_FOLDER": str(folder), **faults}


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """What the job saves where nothing happens: the hash of the weights."""
    place = tmp_path_factory.mktemp("undisturbed")
    done = run_job(words, place, place / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    return sha256(place / "out/model/model.safetensors")


@pytest.mark.slow
def test_a_quota_is_an_error_and_without_it_the_job_goes_on(faulty, words, undisturbed, tmp_path):
    """The file system has room, so that the check beforehand passes; it is the write that is refused."""
    output = tmp_path / "out"
    done = run_job(words, tmp_path, output, **faulty(output, FAULTY_QUOTA="100000"))
    assert "Disk quota exceeded" in error_line(done)
    assert not list(output.rglob("*.safetensors"))

    done = run_job(words, tmp_path, output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sha256(output / "model/model.safetensors") == undisturbed


@pytest.mark.slow
def test_a_disk_that_is_slow_to_sync_costs_time_and_nothing_else(faulty, words, undisturbed, tmp_path):
    output = tmp_path / "out"
    slow = faulty(output, FAULTY_FSYNC_S="2")
    output.mkdir()
    program = f"import os, time; start = time.time(); os.fsync(os.open('{output}', 0)); print(time.time() - start)"
    took = subprocess.run([sys.executable, "-c", program], env={**os.environ, **slow}, capture_output=True, text=True)
    assert float(took.stdout) >= 2
    done = run_job(words, tmp_path, output, **slow)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sha256(output / "model/model.safetensors") == undisturbed
    assert not list(output.rglob("*.tmp"))


def test_weights_that_vanish_after_the_check_are_an_error_of_one_line(tmp_path):
    folder = model_folder(tmp_path / "model", tiny_model())
    source = open_source(ModelConfig(path=str(folder)))
    next(iter(folder.glob("*.safetensors"))).unlink()
    with pytest.raises(ModelError, match="cannot be loaded: .*safetensors") as caught:
        load(source, torch.float32, nullcontext())
    assert caught.value.exit_code == 2
