"""`tsp doctor` sees what is missing, says what to do, changes nothing and keeps stdout clean."""

import os
import shutil
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from tsp import doctor
from tsp.machine import CPU_OP
from tsp.tracking.store import open_store
from tsp.tracking.ui import store_condition


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No programs on PATH, none beside the interpreter."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    open_store(f"sqlite:///{root}/mlruns/mlflow.db", root)
    return root


def copied(store, root):
    shutil.copytree(store / "mlruns", root / "mlruns")
    return root / "mlruns" / "mlflow.db"


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_everything_is_looked_at_and_nothing_is_made_or_printed(tmp_path, capfd):
    checks = doctor.examine(tmp_path)
    assert {"Python", "C++ compiler", "ninja", "torch", "deepspeed", "transformers", "mlflow", "datasets"} <= {
        check["name"] for check in checks
    }
    assert {"processors", "deepspeed's CPU op", "tracking store", "free disk"} <= {check["name"] for check in checks}
    assert all(set(check) == {"name", "ok", "found", "advice"} for check in checks)
    assert all(check["found"] for check in checks)
    assert all(bool(check["advice"]) != check["ok"] for check in checks)
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("bare_machine")
def test_missing_compiler_is_named_with_what_to_install(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    check = doctor.check_compiler()
    assert not check.ok
    assert check.found == "no c++"
    assert "g++" in check.advice
    monkeypatch.setenv("CXX", "my-compiler")
    assert doctor.check_compiler().found == "no my-compiler"


@pytest.mark.usefixtures("bare_machine")
def test_ninja_beside_the_interpreter_counts(tmp_path):
    assert doctor.check_ninja() == doctor.Check("ninja", False, "none", "pip install ninja")
    (tmp_path / "ninja").touch(0o755)
    assert doctor.check_ninja().ok


def test_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    check = doctor.check_python()
    assert not check.ok
    assert check.advice == "use Python >= 3.10"


def test_packages_are_compared_with_the_ranges():
    wanted = [Requirement(line) for line in ("torch>=2.9", "mlflow>=3.17,<4", "datasets>=4", "click>=8", "rich>=13")]
    versions = {"torch": "2.13.0+cpu", "mlflow": "4.1.0", "click": "8.3", "rich": "12.0"}
    checks = {check.name: check for check in doctor.check_packages(wanted, versions.get)}
    assert set(checks) == {"torch", "mlflow", "datasets", "rich"}
    assert checks["torch"].ok
    assert checks["mlflow"].found == "4.1.0, needs <4,>=3.17"
    assert checks["mlflow"].advice == "pip install 'mlflow<4,>=3.17'"
    assert checks["datasets"].found == "not installed"
    assert not checks["rich"].ok


def test_running_from_the_sources_is_said():
    first, *others = doctor.check_packages(None, {"torch": "2.13.0"}.get)
    assert (first.name, first.ok) == ("tsp", False)
    assert "pip install -e ." in first.advice
    assert [check.name for check in others if check.ok] == ["torch"]


def test_compiled_operation_is_found_and_its_absence_is_no_fault(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    before = doctor.check_cpu_op()
    assert before.ok
    assert "waits about a minute" in before.found
    folder = tmp_path / CPU_OP
    folder.mkdir()
    (folder / f"{CPU_OP}.so").touch()
    assert doctor.check_cpu_op().found == str(folder / f"{CPU_OP}.so")


def test_full_disk_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    check = doctor.check_disk(tmp_path)
    assert (check.ok, check.found) == (False, "1.0 GiB")
    assert "free at least 2 GiB" in check.advice


def test_usable_store_is_only_read(store, tmp_path):
    copied(store, tmp_path)
    before = snapshot(tmp_path)
    ok, found, advice = store_condition(tmp_path)
    assert (ok, advice) == (True, "")
    assert "schema" in found
    assert {path: content for path, content in snapshot(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("revision", ["0123456789ab", "zzz"])
def test_store_of_a_newer_mlflow_is_a_fault(store, tmp_path, revision):
    with sqlite3.connect(copied(store, tmp_path)) as connection:
        connection.execute("update alembic_version set version_num = ?", [revision])
    connection.close()
    ok, found, advice = store_condition(tmp_path)
    assert not ok
    assert revision in found
    assert "upgrade mlflow" in advice


def test_store_of_an_older_mlflow_will_be_migrated(store, tmp_path):
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    path = copied(store, tmp_path)
    revisions = [script.revision for script in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()]
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = ?", [revisions[3]])
    connection.close()
    ok, found, _ = store_condition(tmp_path)
    assert ok
    assert "older mlflow" in found
    with sqlite3.connect(path) as connection:
        assert connection.execute("select version_num from alembic_version").fetchone() == (revisions[3],)
    connection.close()


def test_damaged_store_is_a_fault(tmp_path):
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    ok, _, advice = store_condition(tmp_path)
    assert not ok
    assert "not a usable tracking database" in advice


def test_store_that_no_server_answers_for_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    ok, _, advice = store_condition(tmp_path)
    assert not ok
    assert "does not answer" in advice


def test_plain_folder_as_store_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    ok, _, advice = store_condition(tmp_path)
    assert not ok
    assert "sqlite:////ABSOLUTE" in advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written_is_a_fault(tmp_path):
    tmp_path.chmod(0o500)
    ok, found, _ = store_condition(tmp_path)
    tmp_path.chmod(0o700)
    assert (ok, found) == (False, f"{tmp_path} is read-only")
