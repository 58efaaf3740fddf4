"""Nodes hear each other: a job ends everywhere, soon, when one of its nodes is gone or can no longer be reached.

A collective whose peer is silent waits for its timeout, and that has to be long: rank 0 may measure or publish for an
hour while the others wait. So on several nodes each rank holds a connection to rank 0, and a thread of its own sends
a beat every few seconds, whatever the main thread does.

    heartbeat = joined()                            # after the process group; the same call on every rank
    with heartbeat.telling(tracker_says_why):       # errors that a lost node has caused are raised under its name
        ...
    heartbeat.stop()                                # a clean end
"""

import functools
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from tsp.errors import NodeError
from tsp.machine import is_one_node

BEAT_S = 5.0
SILENCE_S = 60.0
"""A rank that was not heard for so long is lost: its node is off, the link is dead, or the process is stopped."""
GRACE_S = 40.0
"""Behind a closed connection stands a process that has ended. This one fails too, with words of its own (behind rank 0
it is silent for 30 s first, see `exits`); where it waits for nobody, it is ended."""
TELL_S = 10.0
"""What a job has to say at such an end may take so long."""
EXIT_CODE = 1
COLLECTIVE = timedelta(hours=12)
"""How long ranks wait for rank 0, which measures and publishes alone. DeepSpeed's 10 minutes are left to the start."""

_BYE = "bye"


class Heartbeat:
    """This process's connections: rank 0 has one to each other rank, the others have one to rank 0."""

    def __init__(self, peers: Mapping[socket.socket, str]) -> None:
        """Begin to beat and to listen.

        Args:
            peers: connections, and how to call who is at their other end; none: all ranks are on one node.
        """
        self.reason = ""
        """Who was lost, in words."""
        self._peers = dict(peers)
        self._told: list[Callable[[str], object]] = []
        self._lost = threading.Event()
        self._stopped = False
        for peer in self._peers:
            peer.setblocking(False)
        if self._peers:
            threading.Thread(target=self._run, name="tsp-heartbeat", daemon=True).start()

    @contextmanager
    def telling(self, tell: Callable[[str], object]) -> Iterator[None]:
        """For the length of a block `tell` is called with the reason if the process has to be ended.

        Raises:
            NodeError: in place of the error of a collective whose peer is gone.
        """
        self._told.append(tell)
        try:
            yield
        except RuntimeError as error:
            # The collective may have heard of it first.
            if self._peers and self._lost.wait(BEAT_S):
                raise NodeError(self.reason) from error
            raise
        finally:
            self._told.remove(tell)

    def stop(self) -> None:
        """This process ends as it should; the others need not worry."""
        self._stopped = True
        self._send(_BYE)

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for peer in self._peers:
            selector.register(peer, selectors.EVENT_READ)
        next_beat = time.monotonic()
        heard = dict.fromkeys(self._peers, next_beat)
        deadline = float("inf")
        while not self._stopped:
            ready = selector.select(max(0.0, next_beat - time.monotonic()))
            now = time.monotonic()
            if now - next_beat > SILENCE_S / 2:
                heard = dict.fromkeys(heard, now)  # It was this process that stood still.
            for key, _ in ready:
                speaker: Any = key.fileobj
                heard[speaker] = now
                if word := _word(speaker):
                    selector.unregister(speaker)
                    del heard[speaker]
                if word and word != _BYE:
                    deadline = min(deadline, now + GRACE_S)
                    self._lose(f"{self._peers[speaker]} is gone: {word}")
            if now >= next_beat:
                self._send("")
                next_beat = now + BEAT_S
            for silent in [peer for peer, at in heard.items() if now - at > SILENCE_S]:
                self._lose(f"{self._peers[silent]} has been silent for {SILENCE_S:.0f} s, off or out of reach")
                deadline = now
            if now >= deadline:
                self._end()

    def _lose(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._lost.set()

    def _end(self) -> None:
        """The main thread may hang in a collective, where no exception and no signal reaches it."""
        self._send(self.reason)
        for tell in self._told[::-1]:
            teller = threading.Thread(target=tell, args=(self.reason,), daemon=True)
            teller.start()
            teller.join(TELL_S)
        sys.stderr.write(f"error: {self.reason}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _send(self, word: str) -> None:
        for peer in self._peers:
            with suppress(OSError):  # Who listens finds out.
                peer.send(f"{word}\n".encode())


def name_of(rank: int) -> str:
    """How this process is called where another node has to say something about it."""
    return f"rank {rank} on {socket.gethostname()}"


@functools.cache
def joined() -> Heartbeat:
    """The heartbeat of this process; the same call on every rank, with the process group made.

    One for all engines that a process starts.
    """
    # All on one node: its launcher ends all when one ends.
    heartbeat = Heartbeat({} if is_one_node() else _connected(torch.distributed.get_rank()))
    torch.distributed.distributed_c10d._set_pg_timeout(COLLECTIVE)
    return heartbeat


def _connected(rank: int) -> dict[socket.socket, str]:
    """Rank 0's connections to all others, or another's to rank 0, and the names of those at the other end."""
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, name_of(rank))
    server = _server() if rank == 0 else None
    box = [(server.getsockname()[1], secrets.token_hex(16)) if server else None]
    torch.distributed.broadcast_object_list(box, src=0)
    port, token = box[0] or (0, "")
    if server is None:
        peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=SILENCE_S)
        peer.sendall(f"{token} {rank:08d}\n".encode())
        return {peer: names[0]}
    with server:
        return {peer: names[number] for peer, number in _accepted(server, token, len(names) - 1)}


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(server: socket.socket, token: str, count: int) -> Iterator[tuple[socket.socket, int]]:
    """Connections of our ranks with their numbers; who does not know the token is a stranger."""
    server.settimeout(SILENCE_S)
    length = len(f"{token} {0:08d}\n")
    while count:
        peer, _ = server.accept()
        peer.settimeout(BEAT_S)
        hello = ""
        with suppress(OSError):
            hello = peer.makefile("rb", buffering=0).readline(length).decode(errors="replace")
        given, _, number = hello.partition(" ")
        if not secrets.compare_digest(given.encode(), token.encode()):
            peer.close()
            continue
        count -= 1
        yield peer, int(number)


def _word(peer: socket.socket) -> str:
    """What the other end says beside its beats, or what it means that it can say nothing any more."""
    try:
        data = peer.recv(4096)
    except BlockingIOError:
        return ""
    except OSError:
        data = b""
    return data.decode(errors="replace").replace("\n", "") if data else "it ended without a word"
