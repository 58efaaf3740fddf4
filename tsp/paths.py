"""Where launchers and DeepSpeed configs are: beside the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(relative: str) -> Path:
    """The path of `launchers/...` or `ds_configs/...`, whichever way tsp was installed."""
    inside = _PACKAGE / "shipped" / relative
    return inside if inside.exists() else _PACKAGE.parent / relative
