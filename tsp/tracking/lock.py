"""Only one process, on whatever machine, decides about a registered model at a time.

with locked(client, "demo-pruned") as still_ours:
    ...
    still_ours()        # raises where it is not
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tsp.errors import PromotionError
from tsp.tracking.store import http_limits
from tsp.tracking.who import who

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("tsp")

LOCK = ".lock"
_LOCK_STALE_S = 120.0
"""Nothing under the lock takes more than a few requests: whoever holds it for longer is dead, or very slow."""
_LOCK_WAIT_S = _LOCK_STALE_S + 30
_LOCK_POLL_S = 0.2
_TELL_AFTER_S = 2.0
_REQUEST_S = 20
"""Of silence, after which a request under the lock fails; it is repeated once."""


@contextmanager
def locked(client: "MlflowClient", name: str) -> Iterator[Callable[[], None]]:
    """Only one process, on whatever machine, decides about a model inside the block.

    The lock is a registered model `NAME.lock`: its name is unique in the database, so that only one can create it, be
    the store a file, PostgreSQL or behind a server. One that a killed process has left behind is taken away by whoever
    has waited for two minutes and seen no other: the clocks of two machines may differ.

    Yields:
        What raises PromotionError where it was taken away, to be called right before what must not be done by two.

    Raises:
        PromotionError: others hold it, for two minutes and a half.
    """
    lock, key = f"{name}{LOCK}", secrets.token_hex(8)

    def still_ours() -> None:
        if _lock_tags(client, lock).get("key") != key:
            raise PromotionError(f"deciding about {name} took so long that others may do it now: decide again")

    with http_limits(timeout_s=_REQUEST_S, retries=1):
        _take(client, lock, key, name)
        try:
            yield still_ours
        finally:
            if _lock_tags(client, lock).get("key") == key:
                client.delete_registered_model(lock)


def _take(client: "MlflowClient", lock: str, key: str, name: str) -> None:
    me, since = f"{who()}, process {os.getpid()}", dict[str, float]()
    started, told = time.monotonic(), False
    while not _created(client, lock, me, key):
        waited_s = time.monotonic() - started
        _take_away_if_stale(client, lock, since)
        if waited_s > _TELL_AFTER_S and not told:
            log.warning(
                "%s decides about %s at this moment, or was killed while it did; waiting for at most %.0f s",
                *(_lock_holder(client, lock), name, _LOCK_WAIT_S),
            )
            told = True
        if waited_s > _LOCK_WAIT_S:
            raise PromotionError(
                f"{_lock_holder(client, lock)} decides about {name} at this moment; try again in a minute"
            )
        time.sleep(_LOCK_POLL_S)


def _created(client: "MlflowClient", lock: str, me: str, key: str) -> bool:
    """Whether the lock is ours now."""
    from mlflow.exceptions import MlflowException

    tags = {"holder": me, "key": key}
    try:
        client.create_registered_model(lock, tags=tags, description="Held while an alias moves.")
        return True
    except MlflowException as error:
        # mlflow 3.17 looks at the model that was there first, which may be gone by then.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        # It is also there where the request had gone through, and its answer was lost on the way.
        return _lock_tags(client, lock).get("key") == key


def _take_away_if_stale(client: "MlflowClient", lock: str, since: dict[str, float]) -> None:
    """Delete a lock that was seen for too long.

    Args:
        client: of the registry.
        lock: name.
        since: our clock when each lock, by its tags, was first seen; kept by the caller.
    """
    from mlflow.exceptions import MlflowException

    tags = _lock_tags(client, lock)
    seen_s = time.monotonic() - since.setdefault(str(tags), time.monotonic())
    if tags and seen_s > _LOCK_STALE_S:
        log.warning("%s was left behind and is taken away after %.0f s", lock, seen_s)
        try:
            client.delete_registered_model(lock)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


def _lock_tags(client: "MlflowClient", lock: str) -> dict[str, str]:
    """Empty where it is gone."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(lock).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _lock_holder(client: "MlflowClient", lock: str) -> str:
    return _lock_tags(client, lock).get("holder", "somebody")
