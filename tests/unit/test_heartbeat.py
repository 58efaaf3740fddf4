"""Two ends of a connection: silent, closed, stopped, a stranger's; real sockets, and processes where one is to end."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.models import REPOSITORY
from tsp import heartbeat
from tsp.errors import NodeError, StorageError, TspError, is_everywhere
from tsp.heartbeat import Heartbeat

PROCESS = """
import socket, sys, time
from tsp import heartbeat
heartbeat.BEAT_S, heartbeat.SILENCE_S, heartbeat.GRACE_S, heartbeat.TELL_S = 0.2, 2.0, 1.0, 1.0
peer = socket.socket(fileno=int(sys.argv[1]))
beating = heartbeat.Heartbeat({peer: "rank 1 on node-b"})
print("ready", flush=True)
with beating.telling(lambda reason: (print("told:", reason, flush=True), time.sleep(60))):
    time.sleep(60)
"""


@pytest.fixture
def process():
    """A process with a heartbeat, whose main thread sleeps, and our end of its connection."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-c", textwrap.dedent(PROCESS), str(theirs.fileno())]
    with subprocess.Popen(
        words, cwd=REPOSITORY, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        theirs.close()
        assert child.stdout.readline() == "ready\n"
        yield child, ours
        child.kill()
    ours.close()


def beat(peer, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        peer.send(b"\n")
        time.sleep(0.2)


def test_a_silent_peer_ends_the_process_and_the_tracker_is_told_though_it_hangs(process):
    child, _ = process
    output, errors = child.communicate(timeout=20)
    reason = "rank 1 on node-b has been silent for 2 s, off or out of reach"
    assert child.returncode == heartbeat.EXIT_CODE
    assert output == f"told: {reason}\n"
    assert [line for line in errors.splitlines() if line.startswith("error:")] == [f"error: {reason}"]


def test_a_closed_connection_ends_a_process_that_waits_for_nobody(process):
    child, peer = process
    peer.close()
    _, errors = child.communicate(timeout=20)
    assert child.returncode == heartbeat.EXIT_CODE
    assert "error: rank 1 on node-b is gone: it ended without a word" in errors


def test_what_another_rank_heard_is_passed_on(process):
    child, peer = process
    peer.send(b"\n\nrank 2 on node-c has been silent\n")
    _, errors = child.communicate(timeout=20)
    assert "error: rank 1 on node-b is gone: rank 2 on node-c has been silent" in errors


def test_who_beats_or_takes_his_leave_is_not_lost(process):
    child, peer = process
    beat(peer, 3.0)
    assert child.poll() is None
    peer.send(b"bye\n")
    peer.close()
    time.sleep(3.0)
    assert child.poll() is None


def test_a_process_that_stood_still_itself_blames_nobody(process):
    """As behind Ctrl-Z, or on a laptop that slept."""
    child, peer = process
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(child.pid, signal.SIGCONT)
    beat(peer, 1.0)
    assert child.poll() is None


@pytest.fixture
def beating():
    ours, theirs = socket.socketpair()
    one = Heartbeat({theirs: "rank 1 on node-b"})
    yield one, ours
    one.stop()
    ours.close()


def test_the_error_of_a_collective_gets_the_name_of_who_is_gone(beating):
    one, peer = beating
    with pytest.raises(NodeError, match="rank 1 on node-b is gone") as raised, one.telling(print):
        peer.close()
        raise RuntimeError("connection closed by peer")
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert not is_everywhere(raised.value), "a sweep does not leave it behind"
    assert not is_everywhere(StorageError("no room")), "nor what only the rank that writes has seen"


@pytest.mark.parametrize("error", [ValueError("v"), TspError("t")])
def test_any_other_error_is_left_as_it_is(beating, error):
    one, peer = beating
    with pytest.raises(type(error)) as raised, one.telling(print):
        peer.close()
        raise error
    assert raised.value is error


def test_strangers_are_sent_away():
    server = heartbeat._server()
    port = server.getsockname()[1]
    known = []
    accepting = threading.Thread(target=lambda: known.extend(heartbeat._accepted(server, "token", 1)))
    accepting.start()
    stranger, ours = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
    stranger.sendall(b"GET / HTTP/1.1\n")
    assert stranger.recv(10) == b""
    ours.sendall(b"token 00000003\n")
    accepting.join(10)
    [(connection, rank)] = known
    assert rank == 3
    for one in (server, stranger, ours, connection):
        one.close()
