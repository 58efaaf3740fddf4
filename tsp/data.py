"""Any corpus -> token blocks `[N, T]` and a fingerprint.

Each document of a source (see `documents.py`) is tokenised once with the tokenizer's own special tokens; the documents
are joined and cut into blocks of equal length, the tail is dropped. Beside the blocks stands which token belongs to
which slice (see `slices.py`); slices change no token.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp.config import JobConfig
from tsp.documents import SUFFIXES, documents
from tsp.errors import DataError
from tsp.slices import Document, Slice, read_slices, token_marks


@dataclass(frozen=True)
class Corpus:
    """Token blocks of one source."""

    name: str
    """File stem or last part of the hub id."""
    source: str
    blocks: Tensor
    """`[N, T]` int64."""
    slices: Mapping[str, Tensor] = field(default_factory=dict)
    """`[N, T]` bool each: the tokens of those slices that have any here."""

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the shape and the tokens."""
        digest = hashlib.sha256(str(tuple(self.blocks.shape)).encode())
        digest.update(self.blocks.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Tokens of a source in one row, before they are cut."""

    source: str
    ids: list[int]
    marks: list[int]
    """Slices of each token, see `slices.token_marks`; empty where there are none."""

    def part(self, start: int, stop: int) -> "_Text":
        return _Text(source=self.source, ids=self.ids[start:stop], marks=self.marks[start:stop])


def load_corpora(config: JobConfig, tokenizer: Any, max_positions: int) -> tuple[Corpus, list[Corpus]]:
    """The calibration corpus and those to evaluate on, none of whose text is calibrated on unless it is asked for.

    Raises:
        DataError: a source that is missing, unreadable, empty, or shorter than one block; slices that match nothing.
    """
    source = config.data.source
    block_tokens = _block_tokens("data", config.data.block_tokens, max_positions)
    if config.eval.sources:
        calibration, evals = _tokenize(source, tokenizer, "train"), load_evaluation(config, tokenizer, max_positions)
    else:
        slices = read_slices(config.eval.slices)
        calibration, held_out = _split(source, tokenizer, slices)
        window = _block_tokens("eval", config.eval.block_tokens, max_positions)
        evals = [_corpus(held_out, window, config.eval.max_blocks, slices)]
        _check_slices(config, slices, evals)
    return _corpus(calibration, block_tokens, config.data.max_blocks), evals


def load_evaluation(config: JobConfig, tokenizer: Any, max_positions: int) -> list[Corpus]:
    """The corpora of `eval.sources`.

    Raises:
        DataError: as `load_corpora`; also two corpora of one name.
    """
    window = _block_tokens("eval", config.eval.block_tokens, max_positions)
    names = [corpus_name(source) for source in config.eval.sources]
    if len(set(names)) != len(names):
        raise DataError(f"corpora must differ in name (file stem or last part of the id), got {', '.join(names)}")
    slices = read_slices(config.eval.slices)
    evals = [
        _corpus(_tokenize(source, tokenizer, "test", slices), window, config.eval.max_blocks, slices)
        for source in config.eval.sources
    ]
    _check_slices(config, slices, evals)
    return evals


def _block_tokens(section: str, asked: int | None, max_positions: int) -> int:
    if (asked or 0) > max_positions:
        raise DataError(f"{section}.block_tokens must be at most the model's {max_positions} positions, got {asked}")
    return asked or min(2048, max_positions)


def corpus_name(source: str) -> str:
    """`dir/wiki.test.txt` -> `wiki.test`; `Salesforce/wikitext:wikitext-2-raw-v1` -> `wikitext`."""
    path = Path(source)
    if path.suffix in SUFFIXES:
        return path.stem
    return path.name.partition(":")[0] if not path.is_dir() else path.resolve().name


def _split(source: str, tokenizer: Any, slices: Sequence[Slice]) -> tuple[_Text, _Text]:
    """Hold out 10 %: documents by hash, a single one by position; `stdlib` has sides of its own."""
    if source == "stdlib":
        return _tokenize(source, tokenizer, "train"), _tokenize(source, tokenizer, "test", slices)
    found = list(documents(source, tokenizer, "train"))
    if len(found) == 1:
        text = _text(source, found, tokenizer, slices)
        border = len(text.ids) - len(text.ids) // 10
        return text.part(0, border), text.part(border, len(text.ids))
    held_out = [hashlib.sha256(document.text.encode()).digest()[0] % 10 == 0 for document in found]
    return (
        _text(source, (document for document, out in zip(found, held_out, strict=True) if not out), tokenizer),
        _text(source, (document for document, out in zip(found, held_out, strict=True) if out), tokenizer, slices),
    )


def _tokenize(source: str, tokenizer: Any, split: str, slices: Sequence[Slice] = ()) -> _Text:
    return _text(source, documents(source, tokenizer, split), tokenizer, slices)


def _text(source: str, found: Iterable[Document], tokenizer: Any, slices: Sequence[Slice] = ()) -> _Text:
    by_place = any(one.regex is not None for one in slices)
    if by_place and not tokenizer.is_fast:
        raise DataError(
            f"slices by regex need a tokenizer that knows where its tokens stand (a fast one); "
            f"{type(tokenizer).__name__} does not: use `file` or `field`"
        )
    options = {"return_offsets_mapping": True} if by_place else {}
    ids: list[int] = []
    marks: list[int] = []
    for document in found:
        encoded = tokenizer(document.text, verbose=False, **options)
        ids += encoded["input_ids"]
        if slices:
            marks += token_marks(slices, document, len(encoded["input_ids"]), encoded.get("offset_mapping"))
    return _Text(source=source, ids=ids, marks=marks)


def _corpus(text: _Text, block_tokens: int, max_blocks: int | None, slices: Sequence[Slice] = ()) -> Corpus:
    num_blocks = len(text.ids) // block_tokens
    if num_blocks == 0:
        raise DataError(
            f"corpus {text.source} has {len(text.ids)} tokens, less than one block of {block_tokens}; "
            "give more text or a smaller block_tokens"
        )

    def blocks(values: list[int]) -> Tensor:
        cut = torch.tensor(values[: num_blocks * block_tokens]).view(num_blocks, block_tokens)
        return evenly_spread(cut, max_blocks)

    masks = {one.name: blocks(text.marks) >> bit & 1 == 1 for bit, one in enumerate(slices)}
    # The first token of a window is not predicted.
    present = {name: mask for name, mask in masks.items() if mask[:, 1:].any()}
    return Corpus(corpus_name(text.source), text.source, blocks(text.ids), present)


def _check_slices(config: JobConfig, slices: Sequence[Slice], evals: Sequence[Corpus]) -> None:
    empty = [one.name for one in slices if not any(one.name in corpus.slices for corpus in evals)]
    if empty:
        raise DataError(
            f"--slices {config.eval.slices}: {', '.join(empty)} match nothing in the windows of "
            f"{', '.join(corpus.name for corpus in evals)}; mend the file or measure more windows (eval.max_blocks)"
        )


def evenly_spread(blocks_NT: Tensor, max_blocks: int | None) -> Tensor:
    """At most `max_blocks` of the blocks, at even distances; None: all."""
    num_blocks = len(blocks_NT)
    if max_blocks is None or num_blocks <= max_blocks:
        return blocks_NT
    return blocks_NT[torch.arange(max_blocks) * num_blocks // max_blocks].clone()
