"""The tracker that ignores everything: off rank 0, and with tracking turned off."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Status = Literal["FINISHED", "FAILED", "KILLED"]


class NullTracker:
    """Has the verbs of `run.Tracker` and does nothing."""

    run_id = ""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def text(self, content: str, name: str) -> None:
        """Nothing."""

    def image(self, image: "Path | np.ndarray", key: str, step: int) -> None:
        """Nothing."""

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Nothing."""

    def register(
        self, checkpoint: Path, name: str, *, tags: Mapping[str, str], description: str, metadata: dict[str, Any]
    ) -> str | None:
        """Nothing."""

    def finish(self, status: Status, reason: str | None = None) -> None:
        """Nothing."""

    def links(self, base_url: str | None = None) -> dict[str, str]:
        """No links."""
        return {}
