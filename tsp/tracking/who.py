"""Who gives a command, for what is written down of it."""

import getpass
import os
import socket


def who() -> str:
    """`user@host`; a user whom the machine has no name for, as in many containers, by number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
