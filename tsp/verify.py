"""`tsp verify`: a folder is what it says, works with transformers alone, and is the dense model without some layers."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp.checkpoint import load, prove
from tsp.config import ModelConfig
from tsp.drop import layer_numbers
from tsp.errors import ConfigError, ModelError
from tsp.loaders import check_loader
from tsp.source import Source, load_tokenizer, open_source
from tsp.surgery import kept_layers

_PROBE = (2, 32)
"""Sequences and tokens of the batch whose logits are compared."""


def verify(
    folder: Path,
    *,
    against: str | None,
    dropped: Sequence[int],
    loaders: Sequence[str] = (),
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Look at a folder, reload it in a fresh process, and compare it with the dense model.

    Args:
        folder: the pruned checkpoint.
        against: the dense model, folder or hub id; None: it is not compared.
        dropped: the layers of the dense model that are bypassed.
        loaders: other programs that are to read the folder, see `loaders.LOADERS`.
        trust: run the models' own Python code.

    Returns:
        One row a check: `name`, `ok`, `found`.

    Raises:
        ModelError: there is no such folder, or the dense model has no such layers.
        ConfigError: layers of no model.
    """
    if dropped and against is None:
        raise ConfigError("--layers are those of the dense model, which --against names; give both or neither")
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give the one of a checkpoint")
    try:
        source = open_source(ModelConfig(path=str(folder), trust_remote_code=trust))
    except ModelError as error:
        return [_row("structure", False, str(error))]
    rows = [
        _row("structure", True, f"{source.num_layers} layers at {source.stack}"),
        _layer_numbers(source),
        _tokenizer(source),
    ]
    for loader in loaders:
        try:
            faults = list(check_loader(loader, source))
        except ModelError as error:
            faults = [str(error)]
        rows.append(_row(f"for {loader}", not faults, "; ".join(faults) or "config and tensor names fit"))
    card = "generation_config.json"
    rows.append(_row("generation config", (folder / card).is_file(), card))
    tokens = _tokens(source)
    logits = None
    if against is not None:
        dense = open_source(ModelConfig(path=against, trust_remote_code=trust))
        logits = _bypassed_logits(dense, dropped, tokens)
    try:
        proof = prove(source, tokens, logits)
    except ModelError as error:
        return [*rows, _row("round trip", False, str(error))]
    compared = f"logits within {proof['max_logit_difference']:g} of the dense model's" if against else "finite logits"
    found = "; ".join(proof["faults"]) or f"loads whole, {compared}, cached generation equals uncached"
    return [*rows, _row("round trip", not proof["faults"], found)]


def _layer_numbers(source: Source) -> dict[str, Any]:
    try:
        numbers = layer_numbers(source)
    except ModelError as error:
        return _row("layer numbers", False, str(error))
    ok = numbers == list(range(source.num_layers))
    return _row("layer numbers", ok, f"{len(numbers)} layers on disk, {source.num_layers} in the config")


def _tokenizer(source: Source) -> dict[str, Any]:
    try:
        return _row("tokenizer", True, type(load_tokenizer(source)).__name__)
    except ModelError as error:
        return _row("tokenizer", False, str(error))


def _tokens(source: Source) -> Tensor:
    vocabulary = source.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_PROBE[0], min(_PROBE[1], source.max_positions)), generator=generator)


def _bypassed_logits(dense: Source, dropped: Sequence[int], tokens_BT: Tensor) -> Tensor:
    kept_layers(dense.num_layers, dropped)
    decoder = load(dense, dense.dtype, nullcontext())
    decoder.model.eval()
    with torch.no_grad(), decoder.bypassing(dropped):
        return decoder.model(input_ids=tokens_BT, use_cache=False).logits


def _row(name: str, ok: bool, found: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "found": found}
