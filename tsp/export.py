"""A registered version as a plain folder, or as one file: for whatever serves models and knows nothing of MLflow.

export("models:/demo-pruned@champion", Path("champion"), root=Path.cwd())
"""

import logging
from pathlib import Path
from typing import Any

from tsp.checkpoint import require_new, whole_or_not_at_all
from tsp.errors import ConfigError, ModelError
from tsp.progress import phase
from tsp.tracking.manifest import file_faults
from tsp.tracking.registry import checkpoint_path, place, split_uri
from tsp.tracking.versions import find_version, registry

log = logging.getLogger("tsp")


def export(uri: str, output: Path, *, root: Path) -> dict[str, Any]:
    """Write the Hugging Face folder of a registered version, whole or not at all, each file as it was registered.

    Weights are hard links where the disk is the same: they take no space, and are not to be changed in place.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        output: folder to make; must be new or empty.
        root: working directory of the jobs.

    Returns:
        `{model, version, output, files, hashes}`; `hashes`: `ok`, or `not recorded` of a version that was registered
        without.

    Raises:
        ConfigError: the folder cannot be made.
        ModelError: no such version, or a file is not what was registered.
        TrackingError: the store cannot be used.
    """
    require_new(output)
    name, wanted = split_uri(uri)
    with registry(root) as client:
        version = find_version(client, name, wanted)
        number = str(version.version)
        # From here on it is this version, wherever the alias goes.
        checkpoint = checkpoint_path(f"models:/{name}/{number}", root)
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        try:
            with whole_or_not_at_all(output) as folder:
                for path in phase(files, "export", len(files)):
                    place(path, folder / path.name)
                faults = file_faults(client, version, checkpoint=folder)
                if faults:
                    raise ModelError(
                        f"version {number} of {name} is not as it was registered: {'; '.join(faults[:3])}; nothing "
                        f"was written; `tsp audit {name}` looks at all of it"
                    )
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None
    if faults is None:
        log.warning("version %s of %s was registered without hashes: its files are taken as they are", number, name)
    hashes = "not recorded" if faults is None else "ok"
    return {"model": name, "version": number, "output": str(output), "files": len(files), "hashes": hashes}
