"""The embedded corpus: the Python standard library's own sources, read from the running interpreter.

Real text on every machine, nothing to download. Each module is one document. Its side (train, calibration, held-out)
follows from a hash of its dotted name alone, so the same module is on the same side in every Python version, and
`zipfile.py` (3.11) and `zipfile/__init__.py` (3.12) are the same module.

Left out: tests, site-packages, tables written by a generator, and what is specific to one build.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "calibration", "held-out")

# Shares of the modules, in percent, in the order of SPLITS.
_SHARES_PCT = (80, 10, 10)

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "__pycache__", "encodings"}
)
# Machine-written tables: text of another kind, and half a megabyte of it.
_SKIPPED_MODULES = frozenset({"pydoc_data.topics", "html.entities", "_sysconfigdata", "keyword", "token"})


def stdlib_split(module: str) -> str:
    """The side a module is on.

    Args:
        module: dotted name, e.g. `email.message`.

    Returns:
        One of `SPLITS`.
    """
    percentile = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % 100
    for split, share in zip(SPLITS, _SHARES_PCT, strict=True):
        if percentile < share:
            return split
        percentile -= share
    raise AssertionError("the shares add up to 100")


def stdlib_documents(split: str) -> Iterator[tuple[str, str]]:
    """Yield `(dotted module name, source text)` of one split, sorted by name."""
    assert split in SPLITS, split
    root = Path(sysconfig.get_path("stdlib"))
    for name, path in sorted(_modules(root)):
        if stdlib_split(name) == split:
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(("config-", "test_")) for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in _SKIPPED_MODULES and not name.startswith("_sysconfigdata_"):
            yield name, path
