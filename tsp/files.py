"""Files on disk: their hash, that they are really there, and whether there is room for more and leave to write it."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tsp.errors import ConfigError, StorageError

GIB = 2**30


def sha256(path: Path) -> str:
    """Hash of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def require_room(folder: Path, num_bytes: int) -> None:
    """Whether there is room for so many bytes.

    Args:
        folder: where they go; the nearest one above it that exists is looked at.
        num_bytes: that are needed.

    Raises:
        StorageError: there is not.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise StorageError(f"{folder} needs {num_bytes / GIB:.4g} GiB, {free / GIB:.4g} GiB are free there")


def require_writable(folder: Path, named: str) -> None:
    """Something can be written into a folder, or, where there is none yet, the nearest one above it.

    Args:
        folder: where it goes.
        named: the option and what it says, for the message.

    Raises:
        ConfigError: it cannot.
    """
    try:
        # Looking, too, may be forbidden, and a name may be too long.
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{named} cannot be written: {error.strerror or error}") from None


def require_new(output: Path, *, at_once: bool = False) -> None:
    """A folder to be made must be new or empty, and where it can be written; tried now, not after hours of work.

    Args:
        output: the folder.
        at_once: it is to be put in its place by `checkpoint.whole_or_not_at_all`, beside which it is made.

    Raises:
        ConfigError: it is not.
    """
    named, output = f"--output {output}", output.absolute()
    try:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
        stays = output.is_mount() or output.is_symlink()
    except OSError as error:
        raise ConfigError(f"{named} cannot be written: {error.strerror or error}") from None
    if taken:
        raise ConfigError(f"{named} must be a new or an empty folder, it is not")
    if at_once and stays:
        raise ConfigError(f"{named} is a link or where a disk is mounted, and stays; give a folder in it")
    require_writable(output.parent if at_once else output, named)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(source: Path, target: Path) -> None:
    """Hard-link weights, copy the rest: small files are the ones somebody edits in place."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # Another file system, or one without links: copy.
    shutil.copy2(source, target)
