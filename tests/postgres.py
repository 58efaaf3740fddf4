"""A PostgreSQL server of a test's own."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.parse
from pathlib import Path

from tests.models import free_port

START_S = 120
DATABASE_PASSWORD = "s3cret@/%of the database"


def postgres_program(name: str) -> str | None:
    """Where it is; Debian keeps it off PATH."""
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(kept[-1]) if kept else None)


class Postgres:
    """A PostgreSQL of its own, which asks for a password."""

    def __init__(self) -> None:
        # It does not run as root, and a folder of pytest's is closed to others.
        self.folder = Path(tempfile.mkdtemp(prefix="tsp-postgres-"))
        nobody = pwd.getpwnam("nobody")
        self._as = {}
        if os.geteuid() == 0:
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self.port = free_port()
        password = self.folder / "password"
        password.write_text(DATABASE_PASSWORD)
        password.chmod(0o644)
        data = str(self.folder / "data")
        options = ["-D", data, "-U", "tsp", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"]
        self._run("initdb", *options, "--encoding=UTF8", "--locale=C").check_returncode()
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        words = [word for setting in settings for word in ("-c", setting)]
        self.process = subprocess.Popen(
            [postgres_program("postgres"), "-D", data, "-p", str(self.port), *words],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._as,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.1)

    def uri(self, database: str) -> str:
        return f"postgresql://tsp:{urllib.parse.quote(DATABASE_PASSWORD, safe='')}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        import psycopg2

        connection = psycopg2.connect(self.uri(database), connect_timeout=2)
        connection.autocommit = True
        connection.cursor().execute(statement)
        connection.close()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)
        shutil.rmtree(self.folder)

    def _answers(self) -> bool:
        import psycopg2

        try:
            self.execute("select 1")
            return True
        except psycopg2.OperationalError:
            return False

    def _run(self, program: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run([postgres_program(program), *words], cwd=self.folder, capture_output=True, **self._as)
