"""Wrong input, whatever the command: exit code 2, one line that names it and what to do, nothing left behind."""

import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from tests.contract.wrong_inputs import ON_RANKS, TABLE
from tests.models import REPOSITORY, corpus_file, model_folder, sample, tiny_model
from tsp.cli import launched_prune, main

SECONDS = 5.0
LENGTH = 200
PROCESSES = 6
"""So many rows are also run as the user would, each as a process."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model folder and a text that are in order."""
    place = tmp_path_factory.mktemp("good")
    model = tiny_model(num_layers=3)
    return model_folder(place / "model", model), corpus_file(place / "tiny-text.jsonl", sample(model, 100, 16))


@pytest.fixture
def laid_out(good, tmp_path, monkeypatch):
    """Makes the files of a row, and returns its words."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def lay_out(row):
        model, text = good
        if row.model:
            model = shutil.copytree(model, tmp_path / "spoilt")
        for name, content in row.model.items():
            (model / name).unlink(missing_ok=True)
            if content is not None:
                (model / name).write_bytes(content)
        for name, content in row.files.items():
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for name, value in row.variables.items():
            monkeypatch.setenv(name, value)
        return shlex.split(row.words.replace("{model}", str(model)).replace("{text}", str(text)))

    return lay_out


def everything_below(folder):
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def assert_one_line(row, code, stdout, stderr):
    assert code == 2, stderr[-2000:]
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert lines[0] == stderr.strip().splitlines()[-1], "the last word"
    assert len(lines[0]) <= LENGTH, f"{len(lines[0])}: {lines[0]}"
    assert lines[0].isprintable()
    missing = [word for word in row.says if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]}"
    assert stdout == ""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: " ".join(row.words.split()[:8])[-60:])
def test_wrong_input_is_one_line_and_leaves_nothing(row, laid_out, tmp_path):
    words = laid_out(row)
    before, started = everything_below(tmp_path), time.monotonic()
    command, words = (launched_prune, words[1:]) if words[0] == "launched" else (main, words)
    done = CliRunner().invoke(command, words)
    seconds = time.monotonic() - started
    assert_one_line(row, done.exit_code, done.stdout, done.stderr)
    assert everything_below(tmp_path) == before
    # Reading a model, or the index of thousands of tasks, takes what it takes.
    assert seconds < SECONDS or "{model}" in row.words


def test_the_table_is_long_enough_and_has_every_command():
    assert len(TABLE) >= 120
    named = {row.words.split()[0] for row in TABLE}
    without_input = {"doctor", "gc", "sync"}
    assert set(main.commands) - without_input <= named


SEEN = [*TABLE[:: len(TABLE) // PROCESSES], *ON_RANKS]


@pytest.mark.parametrize("row", SEEN, ids=lambda row: " ".join(row.words.split()[:8])[-60:])
def test_a_user_sees_it_soon(row, laid_out, tmp_path):
    words = laid_out(row)
    program = ["-m", "tsp", *words] if words[0] != "launched" else [REPOSITORY / "launchers/prune.py", *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = time.monotonic()
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - started
    # To stdout DeepSpeed writes, too.
    assert_one_line(row, done.returncode, "" if row in ON_RANKS else done.stdout, done.stderr)
    if not any(word in row.words for word in ("--dry-run", "{model}", "launched")):
        assert seconds < SECONDS
