"""How a command ends: one `error:` line and the exit code of the contract, also when several ranks fail at once."""

import atexit
import errno
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from tsp.errors import TspError
from tsp.interrupts import SIGNALS, Terminated, listen
from tsp.masking import mask_logs, masked

if TYPE_CHECKING:
    import psutil

LINE = 200
"""Characters of an error line, at most."""
_CUT = " ... (all of it: --debug)"
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^/\s]+/){2,}(?=[^/\s]+/)")
"""The start of a long path: its last folder and the file stay."""

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# The launcher kills all ranks when one ends with an error. Rank 0 is to have the word before that.
_SILENCE_S = 30.0


@contextmanager
def exit_codes(*, debug: bool = False) -> Iterator[None]:
    """Turn errors and signals of a block into exit codes; only rank 0 prints. No log of the process has credentials."""
    mask_logs()
    listen()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, Terminated) else 130
        _end(" ".join(["interrupted", *map(str, interrupt.args)]), code, debug=False)
    except TspError as error:
        _end(str(error), error.exit_code, debug, error.picture)
    except Exception as error:  # the last line of defence: every failure ends in one line and a code
        refused = _refused_by_disk(error)
        if refused:
            _end(f"{refused}; mend that, then give the same command again, a job's with --resume latest", 1, debug)
        _end(masked(f"{type(error).__name__}: {error}")[:400], 1, debug=True)


def run_passing_signals(command: Sequence[str], *, stdout: TextIO | None = None) -> int:
    """Run a `deepspeed` command to its end, hand signals on to its ranks, and return its exit code.

    The launcher itself would leave its ranks 30 s before it kills them, and end with 1. It has a session of its own, so
    that Ctrl-C in a terminal does not reach it either.

    Args:
        command: its words.
        stdout: where its stdout goes; None: ours.
    """
    import psutil

    child = subprocess.Popen(command, stdout=stdout, start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in _ranks_below(child.pid) or [child]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, hand_on)
    signal.signal(signal.SIGHUP, lambda number, frame: hand_on(signal.SIGTERM, frame))
    code = child.wait()
    return code if code >= 0 else 128 - code


def _ranks_below(pid: int) -> "list[psutil.Process]":
    """What the launcher has started on this node."""
    import psutil

    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if any(word.startswith("--local_rank=") for word in process.cmdline()[2:]):
                found.append(process)
    return found


def run_launched(command: Callable[[], object]) -> NoReturn:
    """Run the command of a process that `deepspeed` has started, and end the process with its exit code.

    The interpreter is not taken down: DeepSpeed keeps process groups alive whose threads may still let go of a tensor,
    and such a thread, finding no interpreter, aborts the process (seen once in some hundred jobs: `terminate called
    without an active exception` behind a finished job).

    Args:
        command: of click, in standalone mode.
    """
    code: object = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _refused_by_disk(error: Exception) -> str | None:
    """What a disk that is full, read-only or over its quota said, to Python or to sqlite; None: it is another fault."""
    said = getattr(error, "orig", None) or error  # sqlalchemy wraps the database's own.
    full = isinstance(error, OSError) and error.errno in _DISK_FAULTS
    return str(said) if full or "disk is full" in str(said) else None


def _end(message: str, code: int, debug: bool, picture: str = "") -> None:
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SILENCE_S)
    if debug:
        print(masked(traceback.format_exc()), end="", file=sys.stderr)
    if picture:
        print(masked(picture), file=sys.stderr)
    # A name out of a file may hold what a terminal obeys.
    line = "".join(sign if sign.isprintable() else " " for sign in masked(message))
    line = f"error: {' '.join(line.split())}"
    if len(line) > LINE:  # the remedy stands at its end
        line = _FOLDERS.sub(".../", line)
    print(line if len(line) <= LINE else line[: LINE - len(_CUT)] + _CUT, file=sys.stderr, flush=True)
    if _joined():
        # In the middle of a step the other ranks' collectives would keep the interpreter from ending.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _joined() -> bool:
    """Is this process a rank of a process group?"""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


@contextmanager
def stdout_kept_clean() -> Iterator[TextIO]:
    """Libraries that print to stdout print to stderr for the length of a block; yields the real stdout."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield stdout
    stdout.flush()
