"""What `tsp server` takes for its store, its addresses, its users, and what it refuses."""

import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tests.models import free_port
from tsp.errors import ConfigError, TrackingError
from tsp.tracking.server import host_patterns, own_names, serve, store_uri
from tsp.tracking.store import open_store, shown
from tsp.tracking.users import admin_of
from tsp.tracking.web import is_loopback, url_of


def test_stores(tmp_path, monkeypatch):
    assert store_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlruns/server/mlflow.db"
    assert store_uri("sqlite:///x.db", tmp_path) == f"sqlite:///{tmp_path}/x.db"
    assert store_uri("postgresql://me@host/db", tmp_path) == "postgresql+psycopg2://me@host/db"
    assert store_uri("postgresql+psycopg://me@host/db", tmp_path) == "postgresql+psycopg://me@host/db"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://me:secret@host/db?sslmode=require")
    assert store_uri(None, tmp_path) == "postgresql+psycopg2://me:secret@host/db?sslmode=require"
    assert store_uri("sqlite:////x.db", tmp_path) == "sqlite:////x.db"


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("postgresql://me:secret@host/db", "--store must not hold a password.*MLFLOW_BACKEND_STORE_URI"),
        ("postgresql://host/db?user=me&password=secret", "--store must not hold a password"),
        ("postgresql://me:secret@host:port/db", r"--store must be .*, got postgresql:\.\.\."),
        ("mysql://me:secret@host/db", r"--store must be .*, got mysql:\.\.\."),
        ("./mlruns", r"--store must be sqlite:///FILE\.db or postgresql://"),
        ("http://me:secret@host:5000", "--store must be"),
    ],
)
def test_stores_that_are_refused(tmp_path, store, message):
    with pytest.raises(ConfigError, match=message) as refused:
        store_uri(store, tmp_path)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "printed"),
    [
        ("http://me:se@cret@host:5000/", "http://host:5000/"),
        ("postgresql://me:secret@host/db?password=secret", "postgresql://host/db"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_no_password_is_printed(uri, printed):
    assert shown(uri) == printed


@pytest.mark.parametrize(
    ("names", "header", "allowed"),
    [
        (["node0"], "node0", True),
        (["node0"], "node0:5000", True),
        (["node0"], "node0.attacker.example", False),
        (["node0:5000"], "node0:5001", False),
        (["10.0.0.1"], "10.0.0.1:5000", True),
        (["10.0.0.1"], "10.0.0.11", False),
        (["::1"], "[::1]:5000", True),
        (["::1"], "[::1]", True),
        (["*.here.example"], "node0.here.example", True),
    ],
)
def test_hosts_are_what_mlflow_takes_them_for(names, header, allowed):
    from mlflow.server.security_utils import is_allowed_host_header

    assert is_allowed_host_header(host_patterns(names), header) is allowed


def test_own_names():
    assert own_names("127.0.0.1") == own_names("localhost") == []
    names = own_names("0.0.0.0")
    assert socket.gethostname() in names
    assert not any(is_loopback(name) for name in names)


@pytest.mark.parametrize(
    ("host", "loopback", "url"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:1"),
        ("127.0.0.9", True, "http://127.0.0.9:1"),
        ("::1", True, "http://[::1]:1"),
        ("localhost", True, "http://localhost:1"),
        ("0.0.0.0", False, "http://127.0.0.1:1"),
        ("::", False, "http://[::1]:1"),
        ("10.0.0.1", False, "http://10.0.0.1:1"),
        ("node0", False, "http://node0:1"),
    ],
)
def test_addresses(host, loopback, url):
    assert (is_loopback(host), url_of(host, 1)) == (loopback, url)


def test_an_address_of_another_machine_is_refused(tmp_path):
    with pytest.raises(TrackingError, match=r"port \d+ cannot be used on 192\.0\.2\.1"):
        serve(tmp_path, host="192.0.2.1", port=free_port(), auth=False)
    assert list(tmp_path.iterdir()) == []


def test_users_need_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flask_wtf", None)
    with pytest.raises(ConfigError, match=r"pip install 'tsp\[server\]', or do without them: --no-auth"):
        serve(tmp_path, host="0.0.0.0", port=free_port())
    assert list(tmp_path.iterdir()) == []


def test_a_password_that_nobody_would_be_asked_for_is_refused(tmp_path):
    (tmp_path / "password").write_text("long enough to be one")
    with pytest.raises(ConfigError, match="--admin-password-file is for a server with users"):
        serve(tmp_path, auth=False, admin_password_file=tmp_path / "password")
    with pytest.raises(ConfigError, match="the admin's password cannot be read"):
        serve(tmp_path, port=free_port(), admin_password_file=tmp_path / "none")  # Looked at on this machine, too.


def test_the_admins_password(tmp_path):
    made = admin_of(None, tmp_path)
    assert made.password not in repr(made)
    assert admin_of(None, tmp_path) == made
    given = tmp_path / "given"
    given.write_text("eleven char\n")
    with pytest.raises(ConfigError, match="at least 12 characters, got 11 in"):
        admin_of(given, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read from"):
        admin_of(tmp_path / "none", tmp_path)
    given.write_text("twelve chars\n")
    assert admin_of(given, tmp_path).password == "twelve chars"


def test_a_server_that_forbids_is_told_from_one_that_is_away(tmp_path):
    class Forbids(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Forbids) as site:
        Thread(target=site.serve_forever, daemon=True).start()
        with pytest.raises(TrackingError, match=r"does not let user None in \(403\); ask who runs it"):
            open_store(f"http://127.0.0.1:{site.server_address[1]}", tmp_path)
        site.shutdown()
