"""Starts of the real launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import REPOSITORY, free_port
from tsp.fresh import LAUNCHER_VARIABLES


def start(
    script: Path, *arguments: object, num_ranks: int, cwd: Path, timeout_s: float = 800
) -> subprocess.CompletedProcess:
    """`deepspeed --num_accelerators N SCRIPT ...`, as a user would."""
    words = ["deepspeed", "--num_accelerators", num_ranks, "--master_port", free_port(), script, *arguments]
    return run(words, cwd=cwd, timeout_s=timeout_s)


def run(command: list[object], *, cwd: Path, timeout_s: float = 800) -> subprocess.CompletedProcess:
    """A command that starts ranks, in the environment of a user's shell."""
    dropped = LAUNCHER_VARIABLES | {"MLFLOW_RUN_ID"}
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    words = [str(word) for word in command]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(words, cwd=cwd, env=environment, **options) as child:
        try:
            output, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail(f"no end after {timeout_s} s: {str(error.stderr)[-2000:]}")
        except BaseException:
            # The launcher's ranks are its grandchildren; killing the launcher alone would leave them.
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, child.returncode, output, errors)


@pytest.fixture(scope="session")
def launch():
    """The function that starts ranks."""
    return start


@pytest.fixture(scope="session")
def command():
    """The function that runs a command line."""
    return run
