"""A registered version as a plain folder, or as one file: for whatever serves models and knows nothing of MLflow.

export("models:/demo-pruned@champion", Path("champion"), root=Path.cwd())
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.checkpoint import whole_or_not_at_all
from tsp.errors import ConfigError, ModelError
from tsp.files import place, require_new
from tsp.gguf_file import require_gguf, write_gguf
from tsp.progress import phase
from tsp.tracking.fetch import checkpoint_path, split_uri
from tsp.tracking.manifest import file_faults
from tsp.tracking.versions import find_version, registry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("tsp")

FORMATS = ("hf", "gguf")


def export(uri: str, output: Path, *, file_format: str = "hf", root: Path) -> dict[str, Any]:
    """Write a registered version, whole or not at all, from files that are as they were registered.

    A Hugging Face folder's weights are hard links where the disk is the same: they take no space, and are not to be
    changed in place.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        output: folder to make; must be new or empty.
        file_format: of `FORMATS`; `hf`: the Hugging Face folder, `gguf`: `model.gguf` alone.
        root: working directory of the jobs.

    Returns:
        `{model, version, output, files, hashes}`; `hashes`: `ok`, or `not recorded` of a version that was registered
        without.

    Raises:
        ConfigError: the folder cannot be made, or the package gguf is missing.
        ModelError: no such version, a file is not what was registered, or GGUF cannot hold the model.
        TrackingError: the store cannot be used.
    """
    require_new(output, at_once=True)
    if file_format == "gguf":
        require_gguf()
    name, wanted = split_uri(uri)
    with registry(root) as client:
        version = find_version(client, name, wanted)
        number = str(version.version)
        # From here on it is this version, wherever the alias goes.
        checkpoint = checkpoint_path(f"models:/{name}/{number}", root)
        try:
            with whole_or_not_at_all(output) as folder:
                if file_format == "gguf":
                    hashes = _require_as_registered(client, version, checkpoint)
                    write_gguf(checkpoint, folder / "model.gguf")
                else:
                    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
                    for path in phase(files, "export", len(files)):
                        place(path, folder / path.name)
                    hashes = _require_as_registered(client, version, folder)
                num_files = len(list(folder.iterdir()))
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None
    return {"model": name, "version": number, "output": str(output), "files": num_files, "hashes": hashes}


def _require_as_registered(client: "MlflowClient", version: "ModelVersion", folder: Path) -> str:
    """`ok`, or `not recorded`."""
    faults = file_faults(client, version, checkpoint=folder)
    if faults is None:
        log.warning(
            "version %s of %s was registered without hashes: its files are taken as they are",
            version.version, version.name,
        )  # fmt: skip
        return "not recorded"
    if faults:
        raise ModelError(
            f"version {version.version} of {version.name} is not as it was registered: {'; '.join(faults[:3])}; "
            f"nothing was written; `tsp audit {version.name}` looks at all of it"
        )
    return "ok"
