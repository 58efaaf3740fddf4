"""Credentials do not leave: what is logged, shown or written passes `masked` first.

    masked("postgresql://me:s3cret@host/db")        # postgresql://***@host/db

Known as secret are: what stands before the @ of a URI; the value of a `password=`, `token=`, ...; Hugging Face tokens
by their form; and, wherever they turn up, the values of environment variables whose names end in TOKEN, PASSWORD,
SECRET or KEY, and the passwords of URIs in the environment. A secret that is an ordinary word is masked in ordinary
text too.
"""

import functools
import logging
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

MASK = "***"

_USERINFO = re.compile(r"(?<=://)[^\s/?#'\"]+@")
# `eos_token=` is a word of a tokenizer, `hub_token=` is none.
_NAMED = re.compile(
    r"(?i)((?:password|passwd|secret|(?:secret|access|api)_?key|(?:(?:hub|hf|access|auth|api|session)_|(?<![a-z_]))token)"
    r"(?:=|['\"]\s*:\s*['\"]))[^\s&;,'\"\\]+"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

# SQLAlchemy takes a slash in a password as it is. A port and a path with an @ in it are none.
_PASSWORD = re.compile(r"://[^\s/:@]*:(?!\d+/)(\S+)@")
_NAME = re.compile(r"(?i)(token|password|passwd|_pwd|secret|key)$")
_LEAST = 6
"""Characters of a value that is looked for everywhere: a shorter one would be found in innocent words."""


def masked(text: str) -> str:
    """The text with `***` for every credential in it."""
    for value in _values(tuple(sorted(os.environ.items()))):
        # Not within a longer word, which is another one.
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", MASK, text)
    text = _USERINFO.sub(f"{MASK}@", text)
    return _TOKEN.sub(MASK, _NAMED.sub(rf"\1{MASK}", text))


def masked_tree(value: Any) -> Any:
    """The same of all texts in nested mappings and sequences, before they are written as JSON or YAML."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: masked_tree(entry) for key, entry in value.items()}
    return [masked_tree(entry) for entry in value] if isinstance(value, list | tuple) else value


class MaskedFormatter(logging.Formatter):
    """Of a handler whose lines are kept: message and traceback are masked."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _MaskedRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  logging's own name.
        return masked(super().getMessage())


def mask_logs() -> None:
    """From now on whatever this process logs is masked, libraries too; for the doors, which own their process."""
    logging.setLogRecordFactory(_MaskedRecord)


@functools.lru_cache(maxsize=1)
def _values(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Secret values of an environment, the longest first."""
    found = {value.strip() for name, value in environment if _NAME.search(name) and not _is_path(value)}
    for _, value in environment:
        for password in _PASSWORD.findall(value):
            found |= {password, urllib.parse.unquote(password)}
    return tuple(sorted((value for value in found if len(value) >= _LEAST), key=len, reverse=True))


def _is_path(value: str) -> bool:
    """Of a file with a secret in it; the path is none."""
    return os.path.isabs(value) and os.path.exists(value)


def one_line(error: Exception) -> str:
    """What went wrong, for the end of a message."""
    return " ".join(masked(str(error)).split())[:100]
