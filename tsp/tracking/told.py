"""Which points of its metrics a run has already been told, so that a job that does all again tells none twice."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Run


def last_steps(run: "Run", owed: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The largest step by metric.

    Args:
        run: as MLflow has it; of each metric it gives the point with the largest step.
        owed: records of the spool that MLflow may not have yet.
    """
    steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    for record in owed:
        if record["kind"] == "metrics":
            steps |= {key: max(record["step"], steps.get(key, -1)) for key in record["values"]}
    return steps
