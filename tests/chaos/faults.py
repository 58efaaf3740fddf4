"""What is done to jobs, and what of it shows afterwards. Each returns its row of the table."""

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.world import REGISTERED, World, differences, until
from tests.mlflow_server import Server

STARTUP_S, REGISTRATION_S = 5.0, 5.0
"""Before the first nothing has been opened; the second comes behind all that a result tells."""
# SIGKILL more often than the rest: it is the one that nobody can answer.
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Row:
    """Of the table; all but the first two columns have to be 0."""

    fault: str
    injected: int = 0
    survived: int = 0
    lost_points: int = 0
    doubled_points: int = 0
    wrong_statuses: int = 0
    different_checkpoints: int = 0
    missing_or_doubled_versions: int = 0

    @property
    def faultless(self) -> bool:
        return self.injected == self.survived and not any(list(asdict(self).values())[3:])


@dataclass(frozen=True)
class Expected:
    """The job that nothing has disturbed."""

    checkpoint: str
    points: Any
    seconds: float


def undisturbed(world: World) -> Expected:
    """Run it."""
    code = world.start("whole").wait()
    assert code == 0, (world.root / "whole.err").read_text()[-3000:]
    [run] = world.runs("whole")
    # Not the whole process's: DeepSpeed compiles for a minute where it has not run before.
    seconds = json.loads((world.root / "whole" / "result.json").read_text())["seconds"]["total"]
    return Expected(world.checkpoint("whole"), world.points(run), STARTUP_S + seconds + REGISTRATION_S)


def _say(row: Row, number: int) -> None:
    print(f"{row.fault}: {row.survived} of {number} survived so far", file=sys.stderr, flush=True)


def judge(world: World, output: str, expected: Expected, row: Row) -> bool:
    """Whether the job has come to the same end; what is wrong is added to the row."""
    before = asdict(row)
    runs = world.runs(output)
    finished = [run for run in runs if run.info.status == "FINISHED"]
    row.wrong_statuses += sum(run.info.status == "RUNNING" for run in runs) + (len(finished) != 1)
    for run in finished[:1]:
        lost, doubled = differences(expected.points, world.points(run))
        row.lost_points += lost
        row.doubled_points += doubled
        row.missing_or_doubled_versions += world.versions()[run.info.run_id] != 1
    row.different_checkpoints += world.checkpoint(output) != expected.checkpoint
    return asdict(row) == before


def kills(world: World, expected: Expected, number: int, dice: random.Random, per_job: int = 3) -> Row:
    """Cut jobs off at random moments, each a few times, and let them go on."""
    row, job = Row("kill"), 0
    while row.injected < number:
        output, faults = f"killed-{job}", 0
        for _ in range(min(per_job, number - row.injected)):
            moment, signum = dice.uniform(STARTUP_S, expected.seconds), dice.choice(_SIGNALS)
            faults += world.start(output).cut_off_after(moment, signum)
            settled = until(lambda out=output: all(run.info.status != "RUNNING" for run in world.runs(out)), 60)
            row.wrong_statuses += not settled
        code = 0 if (world.root / output / "result.json").exists() else world.start(output).wait()
        row.injected += faults
        if judge(world, output, expected, row) and code == 0:
            row.survived += faults
        job += 1
        _say(row, number)
    return row


def outages(root: Any, number: int, dice: random.Random) -> Row:
    """Stop and start the tracking server while jobs run, at their end too; `tsp sync` delivers what is left."""
    row, job = Row("outage"), 0
    if not number:
        return row
    (root / "server").mkdir(parents=True)
    server = Server(root / "server")
    (root / "jobs").mkdir()
    world = World(root / "jobs", server.uri)
    try:
        expected = undisturbed(world)
        while row.injected < number:
            output = f"outage-{job}"
            running, faults = world.start(output), 0
            until(lambda out=output: bool(world.runs(out)), 60)  # Without a server none begins.
            while running.process.poll() is None and row.injected + faults < number:
                time.sleep(dice.uniform(0.5, 4))
                server.kill()
                faults += 1
                time.sleep(dice.uniform(0.5, 8))
                server.start()
            code = running.wait()
            synced = world.spawn([sys.executable, "-m", "tsp", "sync"], world.root / "sync.err").wait(120)
            row.injected += faults
            if judge(world, output, expected, row) and code == synced == 0:
                row.survived += faults
            job += 1
            _say(row, number)
    finally:
        server.kill()
    return row


def crowd(world: World, expected: Expected, number: int) -> Row:
    """Jobs at once on one store."""
    row = Row("job beside others", injected=number)
    outputs = [f"crowd-{index}" for index in range(number)]
    jobs = [world.start(output) for output in outputs]
    for output, job in zip(outputs, jobs, strict=True):
        code = job.wait(900)
        row.survived += judge(world, output, expected, row) and code == 0
    return row


def promotions(world: World, number: int, dice: random.Random) -> Row:
    """Kill promotions; the next one puts things right, and the audit is content."""
    row = Row("kill of a promotion")
    if not number:
        return row
    versions = sorted(int(one.version) for one in world.client().search_model_versions(f"name = '{REGISTERED}'"))

    def promote(version: int) -> Any:
        words = ["promote", REGISTERED, version, "--require", "ppl_ratio<=1000", "--reason", "chaos"]
        return world.spawn([sys.executable, "-m", "tsp", *words], world.root / "promote.err")

    started = time.monotonic()
    assert promote(versions[0]).wait(120) == 0, (world.root / "promote.err").read_text()[-3000:]
    seconds = time.monotonic() - started
    turn = 0
    while row.injected < number:  # One may be done before its moment comes.
        turn += 1
        version = versions[turn % len(versions)]
        process = promote(version)
        threading.Event().wait(dice.uniform(0.2, seconds))
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        row.injected += alive
        again = promote(version).wait(240)  # The lock of a killed one holds for two minutes.
        champion = world.client().get_model_version_by_alias(REGISTERED, "champion").version
        audit = world.spawn([sys.executable, "-m", "tsp", "audit", REGISTERED], world.root / "audit.err").wait(120)
        good = (again, int(champion), audit) == (0, version, 0)
        row.survived += alive and good
        row.wrong_statuses += not good
    return row
