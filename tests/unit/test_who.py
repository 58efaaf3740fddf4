"""Who gave a command, where the machine has no name for them."""

import os
import subprocess
import sys

import pytest

from tests.models import REPOSITORY

NAMELESS = 54321


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_user_without_a_name_is_a_number():
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    code = f"import os, getpass, socket; os.setuid({NAMELESS}); from tsp.tracking.who import who; print(who())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(f"{NAMELESS}@"), done.stderr
