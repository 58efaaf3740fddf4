"""The end of a process that `deepspeed` has started."""

import subprocess
import sys

import pytest

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
