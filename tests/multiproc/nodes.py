"""Two nodes on one machine: network namespaces joined by a cable, each with a shared memory of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.models import REPOSITORY, free_port
from tsp.fresh import LAUNCHER_VARIABLES

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "tspcable"
"""Name of either end; each namespace has one."""


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Nodes:
    """Made by the fixture `nodes`."""

    def __init__(self):
        self.names = [f"tsp-{os.getpid()}-{node}" for node in "ab"]
        self.jobs = []

    def make(self):
        for name in self.names:
            _ip("netns", "add", name)
        ends = [("name", CABLE, "netns", name) for name in self.names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", CABLE, "up")
            _ip("netns", "exec", name, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm")

    def remove(self):
        for job in self.jobs:
            self.kill(job)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def unplug(self):
        """The interface of node 1 goes down."""
        _ip("-n", self.names[1], "link", "set", CABLE, "down")

    def drop_silently(self):
        """Both ends stay up, and what is sent goes to an address that nobody has."""
        for name, other in zip(self.names, ADDRESSES[::-1], strict=True):
            _ip("-n", name, "neigh", "replace", other, "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", CABLE)

    def plug_in(self):
        """As it was made."""
        _ip("-n", self.names[1], "link", "set", CABLE, "up")
        for name, other in zip(self.names, ADDRESSES[::-1], strict=True):
            command = ["ip", "-n", name, "neigh", "delete", other, "dev", CABLE]
            subprocess.run(command, capture_output=True)

    def run_on(self, number, words, *, cwd, log, **variables):
        """Start a command on a node; its output goes to a file."""
        dropped = LAUNCHER_VARIABLES | {"MLFLOW_RUN_ID"}
        environment = {key: value for key, value in os.environ.items() if key not in dropped} | variables
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        environment["GLOO_SOCKET_IFNAME"] = CABLE
        # `ip netns exec` gives a mount namespace, too.
        own_memory = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        words = ["ip", "netns", "exec", self.names[number], *own_memory, *map(str, words)]
        with log.open("w") as file:
            job = subprocess.Popen(
                words, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.jobs.append(job)
        return job

    def start(self, script, *arguments, cwds, **variables):
        """The same job on both nodes, each with its own launcher; `cwds[k]` is where node k runs and logs."""
        hostfile = cwds[0] / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        port = free_port()
        return [
            self.run_on(
                number,
                ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", number]
                + ["--master_addr", ADDRESSES[0], "--master_port", port, script, *arguments],
                cwd=cwd,
                log=cwd / f"node{number}.log",
                **variables,
            )
            for number, cwd in enumerate(cwds)
        ]

    @staticmethod
    def kill(job):
        """Launcher and ranks of a node, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()

    @staticmethod
    def seconds_to_the_end(jobs, limit_s):
        """Seconds until each of the jobs had ended; None: it has not."""
        started, ended = time.monotonic(), [None] * len(jobs)
        while None in ended and time.monotonic() < started + limit_s:
            for number, job in enumerate(jobs):
                if ended[number] is None and job.poll() is not None:
                    ended[number] = round(time.monotonic() - started, 1)
            time.sleep(0.1)
        return ended


def why_not():
    """Why there can be no nodes here; empty: there can."""
    if os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need `ip` (iproute2)"
    tried = Nodes()
    try:
        tried.make()
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    finally:
        tried.remove()
    return ""
