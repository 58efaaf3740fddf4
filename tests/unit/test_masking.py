"""Credentials in texts: what is masked, what is left alone, and that logs and files pass through it."""

import io
import json
import logging
import urllib.parse

import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from tsp.masking import MaskedFormatter, mask_logs, masked, masked_tree
from tsp.records import write_json

SECRET = "s3cret-W0rd"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://user:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"at postgresql://user:{SECRET}@host/db: refused", "at postgresql://***@host/db: refused"),
        (f"https://{SECRET}@github.com/org/name", "https://***@github.com/org/name"),
        (f"postgresql://host/db?user=u&password={SECRET}&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        (f"--set a.access_token={SECRET} --seed 1", "--set a.access_token=*** --seed 1"),
        (f"{{'api_key': '{SECRET}'}}", "{'api_key': '***'}"),
        (f'{{"password": "{SECRET}"}}', '{"password": "***"}'),
        ("given hf_abcdefghijklmnopqrstuvwxyz", "given ***"),
    ],
)
def test_a_credential_is_masked_and_the_rest_stays(text, expected):
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@work/mlruns/mlflow.db",
        "http://127.0.0.1:5000/#/models/demo@champion",
        "models:/demo@champion",
        "git@github.com:org/name",
        "eos_token=</s> max_new_tokens=64 num_tokens: 5, the token: w5",
        "stage2.lr=0.001 key=value secretary=none",
    ],
)
def test_what_only_looks_like_one_is_left_alone(text):
    assert masked(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "X_SECRET"]
)
def test_a_secret_of_the_environment_is_masked_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert masked(f"run of {SECRET}, not of {SECRET}s") == f"run of ***, not of {SECRET}s"
    monkeypatch.delenv(name)
    assert masked(SECRET) == SECRET


def test_a_path_a_short_word_and_other_variables_are_no_secrets(monkeypatch, tmp_path):
    (tmp_path / "key").touch()
    for name, value in {
        "SSL_KEY": str(tmp_path / "key"),
        "A_TOKEN": "demo",
        "TOKENIZERS_PARALLELISM": "falsely",
    }.items():
        monkeypatch.setenv(name, value)
    text = f"{tmp_path}/key demo falsely"
    assert masked(text) == text


@given(password=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=30))
def test_the_password_that_a_database_driver_would_read_is_masked(password):
    """As it is written in the URI, and as SQLAlchemy, which does the logging in, reads it."""
    uri = f"postgresql://me:{urllib.parse.quote(password, safe='')}@host/db"
    assert sqlalchemy.make_url(uri).password == password
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        assert masked(uri) == "postgresql://***@host/db"
        assert masked(f"cannot log in: {password} .") == "cannot log in: *** ."


def test_a_password_with_a_slash_in_it_is_found_by_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql://me:pa/ssword@host/db")
    assert sqlalchemy.make_url("mysql://me:pa/ssword@host/db").password == "pa/ssword"
    assert masked("at mysql://me:pa/ssword@host/db") == "at mysql://***@host/db"


def test_texts_deep_inside_are_masked_and_numbers_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", 'a"b\\cdé')
    content = {"settings": {"data": ['x a"b\\cdé y'], "n": 1, "t": (True, None, 0.5)}}
    assert masked_tree(content) == {"settings": {"data": ["x *** y"], "n": 1, "t": [True, None, 0.5]}}
    write_json(content, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["data"] == ["x *** y"]


def test_a_log_line_and_its_traceback_are_masked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(MaskedFormatter("%(message)s"))
    logger = logging.Logger("x")
    logger.addHandler(handler)
    try:
        raise ValueError(f"no {SECRET}")
    except ValueError:
        logger.exception("with %s", SECRET)
    assert SECRET not in stream.getvalue()
    assert "with ***" in stream.getvalue()
    assert "ValueError: no ***" in stream.getvalue()


def test_at_a_door_the_logs_of_libraries_are_masked_too(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    logger = logging.getLogger("somebody.else")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning("with %s", SECRET)
        assert SECRET in stream.getvalue()
        mask_logs()
        logger.warning("again %s", SECRET)
        assert stream.getvalue().endswith("again ***\n")
    finally:
        logger.removeHandler(handler)
