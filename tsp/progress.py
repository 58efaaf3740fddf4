"""Progress on stderr: a bar in a terminal, and one line per phase in the log; rank 0 only."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tsp.masking import MaskedFormatter

Item = TypeVar("Item")

log = logging.getLogger("tsp")


def phase(items: Iterable[Item], name: str, total: int | None, *, show: bool = True) -> Iterator[Item]:
    """Yield the items, showing how far it is.

    Args:
        items: what is worked on.
        name: of the phase, e.g. `stage 1`.
        total: number of items; None: not known beforehand.
        show: False off rank 0.
    """
    if not show:
        yield from items
        return
    from tqdm import tqdm

    started, done = time.perf_counter(), 0
    # `disable=None` is tqdm's way to say: no bar where stderr is no terminal.
    for item in tqdm(items, desc=name, total=total, file=sys.stderr, dynamic_ncols=True, leave=False, disable=None):
        yield item
        done += 1
    log.info("%s: %d steps in %.1f s", name, done, time.perf_counter() - started)


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """For the length of a block, show the log on stderr and keep it in a file; None (off rank 0): only warnings."""
    logger = logging.getLogger("tsp")
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path), logging.StreamHandler(sys.stderr)]
    for handler in handlers:
        handler.setFormatter(MaskedFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
