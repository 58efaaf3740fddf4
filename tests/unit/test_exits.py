"""The end of a process that `deepspeed` has started."""

import errno
import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy

from tsp.errors import ConfigError
from tsp.exits import exit_codes

PROGRAM = """
import atexit, sys, threading, time
from tsp.exits import run_launched

def command():
    atexit.register(print, "cleaned up")
    threading.Thread(target=time.sleep, args=(600,)).start()  # The interpreter would wait for it, or fall over it.
    print("done")
    {end}

run_launched(command)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3), ("sys.exit('wrong')", 1)],
)
def test_a_launched_process_ends_whatever_its_threads_do(end, code):
    program = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "done\ncleaned up\n"), done.stderr


def test_a_command_that_breaks_shows_why():
    program = [sys.executable, "-c", PROGRAM.format(end="1 / 0")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/figures/a.png"),
            "No space left on device: 'out/figures",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (sqlalchemy.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full")), "full"),
    ],
)
def test_a_disk_that_refuses_is_said_in_one_line(fault, said, capsys):
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise fault
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.endswith("; mend that, then give the same command again, a job's with --resume latest")


def test_of_a_long_error_line_the_folders_go_before_the_remedy(capsys):
    folder = "/" + "/".join(["folder"] * 40)
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise ConfigError(f"{folder}/model/config.json has no layers (from https://host/a/b/c/d); give another folder")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: .../model/config.json has no layers (from https://host/a/b/c/d); give another folder\n"
    )
    with pytest.raises(SystemExit), exit_codes():
        raise ConfigError("x" * 300)
    line = capsys.readouterr().err.removesuffix("\n")
    assert len(line) == 200
    assert line.endswith("xxx ... (all of it: --debug)")
