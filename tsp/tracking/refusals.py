"""What a store refuses, as one kind of error: by MLflow's own, and by those of plain HTTP, by which files go.

with refusals("experiment demo cannot be read"):
    client.list_artifacts(run_id)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tsp.errors import TrackingError


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Raise TrackingError, which begins with `what`, where the store refuses or does not answer in the block."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        # Of OSErrors, those of requests have a response, or None for one; others are of this disk.
        if isinstance(error, OSError) and not hasattr(error, "response"):
            raise
        raise TrackingError(f"{what}: {str(error).partition(chr(10))[0]}") from error
