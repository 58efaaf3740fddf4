"""What is left on disk: the checkpoint without the dropped layers, proved in a fresh process, and once more in int8."""

import logging
from collections.abc import Collection, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from tsp.checkpoint import prove, round_weights, save_without
from tsp.config import ModelConfig
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.errors import ModelError, StorageError, TspError
from tsp.evaluation.state import Exam
from tsp.files import GIB, require_room
from tsp.job import Job
from tsp.methods.base import Bench, Transfer
from tsp.quantize import Quantized, in_int8
from tsp.records import DropReport
from tsp.shared import Shared, Stopwatch
from tsp.sizes import size_gib
from tsp.source import Source, open_source

log = logging.getLogger("tsp")

_PROBE_TOKENS = 64


def probe(job: Job) -> Tensor:
    """Tokens `[B, T]` whose logits prove a saved folder."""
    return job.evals[0].blocks[:2, :_PROBE_TOKENS]


def move_and_round(job: Job, bench: Bench, move: Transfer, doomed: Collection[int]) -> None:
    """Run a transfer; afterwards all weights have values that the checkpoint can hold, in whatever dtype each is."""
    move(bench, doomed, save_dtype=job.source.dtype)
    weights = dict(bench.decoder.model.named_parameters())
    for name, dtype in job.source.other_dtypes.items():
        if name in weights:
            round_weights([weights[name]], dtype, bench.engine.gathered)


def save(
    job: Job,
    engine: Engine,
    decoder: Decoder,
    checkpoint: Path,
    dropped: Sequence[int],
    tokens: Tensor,
    logits: Tensor,
) -> DropReport:
    """Write the checkpoint and prove it in a fresh process.

    Raises:
        StorageError: there is no room for it, or it cannot be written; nothing of it is left.
    """
    source = job.source
    need = int(size_gib(source, dropped) * GIB)
    engine.on_first(lambda: require_room(checkpoint, need))
    try:
        save_without(decoder, source, dropped, checkpoint, gathered=engine.gathered, write=engine.is_first)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{checkpoint} ({need / GIB:.4g} GiB) cannot be written: {error}; mend that, and go on with --resume latest"
        ) from error
    return engine.on_first(lambda: _prove(checkpoint, tokens, logits, dropped, source))


def _prove(checkpoint: Path, tokens: Tensor, logits: Tensor, dropped: Sequence[int], source: Source) -> DropReport:
    try:
        pruned = open_source(ModelConfig(path=str(checkpoint), trust_remote_code=source.trust_remote_code))
        proof = prove(pruned, tokens, logits)
    except ModelError as error:
        raise TspError(str(error)) from error  # It is ours, and no wrong input.
    if proof["faults"]:
        raise TspError(f"the saved checkpoint {checkpoint} is not the pruned model: {'; '.join(proof['faults'])}")
    return DropReport(
        dropped=tuple(dropped),
        num_layers=source.num_layers,
        checkpoint=str(checkpoint),
        max_logit_difference=proof["max_logit_difference"],
        cached_equals_uncached=proof["cached_equals_uncached"],
    )


def quantized(
    job: Job, engine: Engine, exam: Exam, exam_key: Hashable, shared: Shared, output: Path, watch: Stopwatch
) -> dict[str, Quantized]:
    """The dense and the pruned model in int8; what does not fit beside the job's own model is left out.

    The pruned one stays, beside the checkpoint that it was made from.
    """
    options: dict[str, Any] = {"dtype": engine.dtype, "probe": probe(job), "trust": job.source.trust_remote_code}
    dense = partial(in_int8, job.source.folder, output / "dense-int8", exam, "quantized", keep=False, **options)
    pruned = partial(in_int8, output / "model", output / "model-int8", exam, "pruned_quantized", keep=True, **options)
    made: dict[str, Quantized] = {}
    for state, make, key in (("quantized", dense, exam_key), ("pruned_quantized", pruned, output)):
        try:
            made[state] = shared.once((state, key), watch, "evaluate", partial(engine.on_first, make))
        except ModelError as error:
            # The job has done its work; it is not to fail for this.
            if engine.is_first:
                log.warning("%s is left out: %s", state.replace("_", " "), error)
    return made
