"""Any corpus -> token blocks `[N, T]` and a fingerprint.

Each document of a source (see `documents.py`) is tokenised once with the tokenizer's own special tokens; the documents
are joined and cut into blocks of equal length, the tail is dropped. A conversation has those of its chat template
instead; in calibration text the replies alone may count (see `chat.py`, `targets.py`). Beside the blocks stands which
token belongs to which slice (see `slices.py`); slices change no token.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp.chat import reply_marks
from tsp.config import DataConfig, JobConfig
from tsp.documents import SUFFIXES, documents
from tsp.errors import DataError
from tsp.slices import Document, Slice, read_slices, token_marks
from tsp.targets import IGNORED, marked, targets, token_ids

# Of ten parts of the text: which is evaluated on, and which settings are compared on.
_HELD_OUT, _TUNING = 0, 1


@dataclass(frozen=True)
class Corpus:
    """Token blocks of one source."""

    name: str
    """File stem or last part of the hub id."""
    source: str
    blocks: Tensor
    """`[N, T]` int64; which tokens count, see `targets.py`."""
    slices: Mapping[str, Tensor] = field(default_factory=dict)
    """`[N, T]` bool each: the tokens of those slices that have any here."""

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the shape and the tokens."""
        digest = hashlib.sha256(str(tuple(self.blocks.shape)).encode())
        digest.update(self.blocks.numpy().tobytes())
        return digest.hexdigest()[:16]

    def about(self, count: str) -> dict[str, Any]:
        """What a result says of it.

        Args:
            count: what its sequences are called: `num_blocks` to learn from, `num_windows` to measure on.
        """
        num_blocks, block_tokens = self.blocks.shape
        known = {"name": self.name, "fingerprint": self.fingerprint}
        return known | {count: num_blocks, "block_tokens": block_tokens}


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Tokens of a source in one row, before they are cut."""

    source: str
    ids: list[int]
    marks: list[int]
    """Slices of each token, see `slices.token_marks`; empty where there are none."""
    counts: list[bool]
    """Which tokens are to be learned; empty: all of them."""

    def part(self, start: int, stop: int) -> "_Text":
        cut = slice(start, stop)
        return _Text(source=self.source, ids=self.ids[cut], marks=self.marks[cut], counts=self.counts[cut])


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """All text of a job; no document (of a single one: no passage) stands in two of them unless that is asked for."""

    calibration: Corpus
    tuning: Corpus | None
    evals: list[Corpus]


def load_corpora(config: JobConfig, tokenizer: Any, max_positions: int) -> Corpora:
    """The text to calibrate on, to compare settings on where `data.tuning_blocks` asks for it, and to evaluate on.

    A tenth of the calibration documents is held out without `eval.sources`, another tenth for tuning.

    Raises:
        DataError: a source that is missing, unreadable, empty, or shorter than one block; slices that match nothing.
    """
    data, evaluation = config.data, config.eval
    block_tokens = _block_tokens("data", data.block_tokens, max_positions)
    if evaluation.sources:
        evals = load_evaluation(config, tokenizer, max_positions)
        tenths = _tenths(data, tokenizer)
        used: set[int] = set()
    else:
        slices = read_slices(evaluation.slices)
        tenths = _tenths(data, tokenizer, slices)
        # `stdlib` has sides of its own.
        own_side = data.source == "stdlib"
        held_out = _tokenize(data.source, tokenizer, slices) if own_side else _joined(data.source, tenths, {_HELD_OUT})
        window = _block_tokens("eval", evaluation.block_tokens, max_positions)
        # What is measured on counts whole.
        part = "" if own_side else " in the tenth that is held out, unless --eval-data names other text"
        evals = [_corpus(replace(held_out, counts=[]), window, evaluation.max_blocks, slices, part)]
        _check_slices(config, slices, evals)
        used = set() if own_side else {_HELD_OUT}
    tuning = None
    if data.tuning_blocks:
        used.add(_TUNING)
        text = _joined(data.source, tenths, {_TUNING})
        tuning = _corpus(text, block_tokens, data.tuning_blocks, part=" in the tenth for data.tuning_blocks")
    calibration = _joined(data.source, tenths, set(range(10)) - used)
    return Corpora(calibration=_corpus(calibration, block_tokens, data.max_blocks), tuning=tuning, evals=evals)


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
        _corpus(_tokenize(source, tokenizer, slices), window, config.eval.max_blocks, slices)
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
        name = path.stem
    else:
        name = path.name.partition(":")[0] if not path.is_dir() else path.resolve().name
    # It ends in the names of metrics and tags, and those of MLflow allow no more.
    return re.sub(r"[^\w.\- ]", "_", name)


def _tenths(data: DataConfig, tokenizer: Any, slices: Sequence[Slice] = ()) -> list[tuple[int, _Text]]:
    """The text to calibrate on, in order, each part with the tenth 0 to 9 it belongs to.

    Documents are shared out by their hash, so that one stays where it is when others come or go; a single one is cut by
    position, from the end.
    """
    source, replies_only = data.source, data.replies_only
    found = list(documents(source, tokenizer, "train"))
    if replies_only and not any(document.is_chat for document in found):
        raise DataError(f"data.replies_only is for rows with `messages`, corpus {source} has none; leave it out")
    if len(found) == 1:
        text = _text(source, found, tokenizer, slices, replies_only=replies_only)
        length, tenth = len(text.ids), len(text.ids) // 10
        borders = [0, *(length - tenth * number for number in range(9, -1, -1))]
        return [(9 - place, text.part(*ends)) for place, ends in enumerate(itertools.pairwise(borders))]
    tenths = [hashlib.sha256(document.text.encode()).digest()[0] % 10 for document in found]
    texts = [_text(source, [document], tokenizer, slices, replies_only=replies_only) for document in found]
    return list(zip(tenths, texts, strict=True))


def _joined(source: str, tenths: Iterable[tuple[int, _Text]], wanted: Collection[int]) -> _Text:
    texts = [text for tenth, text in tenths if tenth in wanted]

    def joined(name: str) -> list[Any]:
        return [value for text in texts for value in getattr(text, name)]

    return _Text(source=source, ids=joined("ids"), marks=joined("marks"), counts=joined("counts"))


def _tokenize(source: str, tokenizer: Any, slices: Sequence[Slice]) -> _Text:
    """Of the side to evaluate on."""
    return _text(source, documents(source, tokenizer, "test"), tokenizer, slices)


def _text(
    source: str,
    found: Iterable[Document],
    tokenizer: Any,
    slices: Sequence[Slice] = (),
    *,
    replies_only: bool = False,
) -> _Text:
    by_place = replies_only or any(one.regex is not None for one in slices)
    if by_place and not tokenizer.is_fast:
        raise DataError(
            "slices by regex and data.replies_only need a tokenizer that knows where its tokens stand (a fast one); "
            f"{type(tokenizer).__name__} does not: use slices by `file` or `field`, or leave replies_only out"
        )
    options = {"return_offsets_mapping": True} if by_place else {}
    ids: list[int] = []
    marks: list[int] = []
    counts: list[bool] = []
    for document in found:
        encoded = tokenizer(document.text, add_special_tokens=not document.is_chat, verbose=False, **options)
        num_tokens = len(encoded["input_ids"])
        ids += encoded["input_ids"]
        if slices:
            marks += token_marks(slices, document, num_tokens, encoded.get("offset_mapping"))
        if replies_only and document.is_chat:
            counts += reply_marks(tokenizer, document.fields["messages"], document.text, encoded, document.place)
        elif replies_only:
            counts += [True] * num_tokens
    return _Text(source=source, ids=ids, marks=marks, counts=counts)


def _corpus(
    text: _Text, block_tokens: int, max_blocks: int | None, slices: Sequence[Slice] = (), part: str = ""
) -> Corpus:
    """Blocks of a text; `part` says, if that is not all, which part of its corpus it is."""
    num_blocks = len(text.ids) // block_tokens
    if num_blocks == 0:
        raise DataError(
            f"corpus {text.source} has {len(text.ids)} tokens{part}, less than one block of {block_tokens}; "
            "give more text or a smaller block_tokens"
        )

    def cut(values: Sequence[int]) -> Tensor:
        return torch.tensor(values[: num_blocks * block_tokens]).view(num_blocks, block_tokens)

    blocks = cut(text.ids)
    if text.counts:
        blocks = _with_something_to_learn(marked(blocks, cut(text.counts)), text.source)
    masks = {one.name: evenly_spread(cut(text.marks) >> bit & 1 == 1, max_blocks) for bit, one in enumerate(slices)}
    # The first token of a window is not predicted.
    present = {name: mask for name, mask in masks.items() if mask[:, 1:].any()}
    return Corpus(corpus_name(text.source), text.source, evenly_spread(blocks, max_blocks), present)


def _with_something_to_learn(blocks_NT: Tensor, source: str) -> Tensor:
    found = blocks_NT[(targets(blocks_NT) != IGNORED).any(dim=1)]
    if not len(found):
        raise DataError(
            f"corpus {source} has no block with an assistant's reply; data.replies_only has nothing to learn"
        )
    return found


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


def token_divergence(one_NT: Tensor, other_NT: Tensor) -> float:
    """How differently two texts use tokens: Jensen-Shannon divergence of the frequencies (Lin 1991), bits in [0, 1].

    Short texts lie apart by chance alone: compare it with that of two halves of one.
    """
    ids = [token_ids(blocks_NT).flatten() for blocks_NT in (one_NT, other_NT)]
    size = int(max(tokens.max() for tokens in ids)) + 1
    shares = [torch.bincount(tokens, minlength=size).double() / len(tokens) for tokens in ids]
    mean = (shares[0] + shares[1]) / 2
    # 0 * log(0) is 0 here.
    return float(sum(torch.special.xlogy(share, share / mean).nansum() for share in shares) / (2 * math.log(2)))
