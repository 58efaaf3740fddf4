"""How a command ends: one `error:` line and the exit code of the contract, also when several ranks fail at once."""

import atexit
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import NoReturn, TextIO

from tsp.errors import TspError
from tsp.masking import mask_logs, masked

# The launcher kills all ranks when one ends with an error. Rank 0 is to have the word before that.
_SILENCE_S = 30.0


class Terminated(KeyboardInterrupt):
    """SIGTERM; handled like Ctrl-C, with another exit code."""


@contextmanager
def exit_codes(*, debug: bool = False) -> Iterator[None]:
    """Turn errors and signals of a block into exit codes; only rank 0 prints. No log of the process has credentials."""
    mask_logs()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, Terminated) else 130
        _end("interrupted", code, debug=False)
    except TspError as error:
        _end(str(error), error.exit_code, debug, error.picture)
    except Exception as error:  # the last line of defence: every failure ends in one line and a code
        _end(masked(f"{type(error).__name__}: {error}")[:400], 1, debug=True)


def run_passing_signals(command: Sequence[str], *, stdout: TextIO | None = None) -> int:
    """Run a command to its end, hand SIGTERM and SIGINT on to it, and return its exit code.

    Args:
        command: its words.
        stdout: where its stdout goes; None: ours.
    """
    child = subprocess.Popen(command, stdout=stdout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: child.send_signal(signum))
    code = child.wait()
    return code if code >= 0 else 128 - code


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


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _end(message: str, code: int, debug: bool, picture: str = "") -> None:
    if int(os.environ.get("RANK", "0")) > 0 and code < 128:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SILENCE_S)
    if debug:
        print(masked(traceback.format_exc()), end="", file=sys.stderr)
    if picture:
        print(masked(picture), file=sys.stderr)
    # A name out of a file may hold what a terminal obeys.
    line = "".join(sign if sign.isprintable() else " " for sign in masked(message))
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        # In the middle of a step the other ranks' collectives would keep the interpreter from ending.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def stdout_kept_clean() -> Iterator[TextIO]:
    """Libraries that print to stdout print to stderr for the length of a block; yields the real stdout."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield stdout
    stdout.flush()
