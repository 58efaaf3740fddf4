"""The errors a user may see. Anything else that is raised is our own mistake and keeps its traceback."""

from tsp.masking import masked


class TspError(Exception):
    """Base of all errors with a message for the user: what is wrong, what was got, what is allowed, what to do.

    Credentials in it are masked: it is printed, logged, and kept as the tag of a failed run.
    """

    exit_code = 1
    picture = ""
    """Lines that point at the place, printed above the message."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class ConfigError(TspError):
    """An option, a config file or a DeepSpeed JSON that cannot be used as it is."""

    exit_code = 2


class ModelError(TspError):
    """A model that is missing, damaged, or of a structure that cannot be pruned."""

    exit_code = 2


class DataError(TspError):
    """A corpus that is missing, empty or too short."""

    exit_code = 2


class StorageError(TspError):
    """A disk that is full, read-only or gone."""


class NumbersError(TspError):
    """Numbers that are not finite, again and again."""


class CollapseError(TspError):
    """A job that came to its end with a result that is no success."""

    exit_code = 3


class BoundError(TspError):
    """A bound that no number of layers keeps, as measured."""

    exit_code = 3


class PromotionError(TspError):
    """An alias that does not move: a requirement that is not kept, or somebody else who moved it."""

    exit_code = 3


class MonitoringError(TspError):
    """A model in use that does not keep what is asked of it."""

    exit_code = 3


class NodeError(TspError):
    """Another node of the job is gone or cannot be reached."""


class TrackingError(TspError):
    """The tracking store or the registry cannot be used."""


def is_everywhere(error: Exception) -> bool:
    """Whether what is wrong is wrong on every rank, so that the ranks can leave it behind together."""
    # One rank writes: while it fails the others may be gathering what it was to write.
    return isinstance(error, TspError) and not isinstance(error, NodeError | StorageError)


def portable(error: Exception, rank: int) -> Exception:
    """The error of a rank as other processes can read it."""
    return error if isinstance(error, TspError) else RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
