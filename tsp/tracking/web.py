"""A web server of mlflow's as a child: started when its port is free, waited for, and ended with all its workers.

    check_port("127.0.0.1", 5000)
    with running(["server", ...], "127.0.0.1", 5000, environment={...}, folder=folder) as server:
        return until_it_ends(server)

What it serves and to whom is for the caller to say.
"""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tsp.errors import ConfigError, TrackingError

LOOPBACK = "127.0.0.1"

VIEW = "?workflowType=machine_learning"
"""MLflow 3 opens in its GenAI view, where charts of training runs and the model registry are hidden."""

START_S = 120.0
"""How long the server may take to answer; a few seconds on an idle machine."""
STOP_S = 10.0
"""How long it may take to end what it is doing."""

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""What asks our own child needs no proxy."""


def check_port(host: str, port: int) -> None:
    """Whether a server could listen there.

    Raises:
        ConfigError: no such address.
        TrackingError: it is not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} is no address of this machine ({reason})") from None
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a port that a server has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise TrackingError(
                f"port {port} cannot be used on {host} ({error.strerror}); give another with --port"
            ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(host: str, port: int) -> str:
    """Address of a server, as this machine reaches it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        address = ipaddress.ip_address(LOOPBACK if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


@contextmanager
def running(
    command: Sequence[str], host: str, port: int, *, environment: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` or `mlflow models serve` in its own process group, stopped with all its workers at the end.

    Args:
        command: after `mlflow`, without `--host` and `--port`.
        host: to listen on.
        port: to listen on.
        environment: what it is told besides our own environment, where other users do not read it.
        folder: its working directory. What lies there is importable and may be written to: never that of a job.

    Yields:
        The server, which answers.

    Raises:
        TrackingError: it did not start.
    """
    # A terminal that is closed ends it like a signal to us; `nohup` keeps it.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--host", host, "--port", str(port)],
        # mlflow finds uvicorn on PATH; its seven processes for GenAI jobs take 1.6 GB.
        env={
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **environment,
        },
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )
    try:
        _wait_until_it_answers(server, f"{url_of(host, port)}/health")
        yield server
    finally:
        _stop(server)


def until_it_ends(server: subprocess.Popen[bytes]) -> int:
    """Wait for the server.

    Returns:
        0 after Ctrl-C; the exit code of a server that ended by itself.
    """
    print("Ctrl-C ends it.", flush=True)
    try:
        return server.wait()
    except KeyboardInterrupt as interrupt:
        # SIGTERM arrives as an heir of KeyboardInterrupt and keeps its own exit code.
        if type(interrupt) is not KeyboardInterrupt:
            raise
        return 0


def _wait_until_it_answers(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with DIRECT.open(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise TrackingError("mlflow's web server did not start; what it says stands above")


def _stop(server: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=STOP_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        # Workers that outlive it, too, and at a second Ctrl-C.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
