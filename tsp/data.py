"""Any corpus -> token blocks `[N, T]` and a fingerprint.

A source is a file or folder of .txt (one document), .jsonl or .parquet (one document a row), a dataset on the hub
(its rows joined by blank lines), or `stdlib`. Each document is tokenised once with the tokenizer's own special tokens;
the documents are joined and cut into blocks of equal length, the tail is dropped.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp.config import JobConfig
from tsp.demo.corpus import stdlib_documents
from tsp.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """Token blocks of one source."""

    name: str
    """File stem or last part of the hub id."""
    source: str
    blocks: Tensor
    """`[N, T]` int64."""

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the shape and the tokens."""
        digest = hashlib.sha256(str(tuple(self.blocks.shape)).encode())
        digest.update(self.blocks.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_corpora(config: JobConfig, tokenizer: Any, max_positions: int) -> tuple[Corpus, list[Corpus]]:
    """The calibration corpus and those to evaluate on, none of whose text is calibrated on unless it is asked for.

    Raises:
        DataError: a source that is missing, unreadable, empty, or shorter than one block.
    """
    source = config.data.source
    block_tokens = _block_tokens("data", config.data.block_tokens, max_positions)
    if config.eval.sources:
        calibration, evals = _tokenize(source, tokenizer, "train"), load_evaluation(config, tokenizer, max_positions)
    else:
        calibration, held_out = _split(source, tokenizer)
        window = _block_tokens("eval", config.eval.block_tokens, max_positions)
        evals = [_corpus(source, held_out, window, config.eval.max_blocks)]
    return _corpus(source, calibration, block_tokens, config.data.max_blocks), evals


def load_evaluation(config: JobConfig, tokenizer: Any, max_positions: int) -> list[Corpus]:
    """The corpora of `eval.sources`.

    Raises:
        DataError: as `load_corpora`; also two corpora of one name.
    """
    window = _block_tokens("eval", config.eval.block_tokens, max_positions)
    names = [corpus_name(source) for source in config.eval.sources]
    if len(set(names)) != len(names):
        raise DataError(f"corpora must differ in name (file stem or last part of the id), got {', '.join(names)}")
    return [
        _corpus(source, _tokenize(source, tokenizer, "test"), window, config.eval.max_blocks)
        for source in config.eval.sources
    ]


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


def _split(source: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Hold out 10 %: documents by hash, a single one by position; `stdlib` has sides of its own."""
    if source == "stdlib":
        return _tokenize(source, tokenizer, "train"), _tokenize(source, tokenizer, "test")
    documents = list(_documents(source, tokenizer, "train"))
    if len(documents) == 1:
        ids = _ids(documents, tokenizer)
        border = len(ids) - len(ids) // 10
        return ids[:border], ids[border:]
    held_out = [hashlib.sha256(text.encode()).digest()[0] % 10 == 0 for text in documents]
    return (
        _ids((text for text, out in zip(documents, held_out, strict=True) if not out), tokenizer),
        _ids((text for text, out in zip(documents, held_out, strict=True) if out), tokenizer),
    )


def _tokenize(source: str, tokenizer: Any, split: str) -> list[int]:
    return _ids(_documents(source, tokenizer, split), tokenizer)


def _ids(documents: Iterable[str], tokenizer: Any) -> list[int]:
    return [token for text in documents for token in tokenizer(text, verbose=False)["input_ids"]]


def _corpus(source: str, ids: list[int], block_tokens: int, max_blocks: int | None) -> Corpus:
    num_blocks = len(ids) // block_tokens
    if num_blocks == 0:
        raise DataError(
            f"corpus {source} has {len(ids)} tokens, less than one block of {block_tokens}; "
            "give more text or a smaller block_tokens"
        )
    blocks = torch.tensor(ids[: num_blocks * block_tokens]).view(num_blocks, block_tokens)
    return Corpus(corpus_name(source), source, evenly_spread(blocks, max_blocks))


def evenly_spread(blocks_NT: Tensor, max_blocks: int | None) -> Tensor:
    """At most `max_blocks` of the blocks, at even distances; None: all."""
    num_blocks = len(blocks_NT)
    if max_blocks is None or num_blocks <= max_blocks:
        return blocks_NT
    return blocks_NT[torch.arange(max_blocks) * num_blocks // max_blocks].clone()


def _documents(source: str, tokenizer: Any, split: str) -> Iterator[str]:
    path = Path(source)
    if source == "stdlib":
        yield from (text for _, text in stdlib_documents("calibration" if split == "train" else "held-out"))
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"corpus folder {source} has no file of {', '.join(SUFFIXES)}")
        for file in files:
            yield from _file_documents(file, tokenizer)
    elif path.exists() or path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        yield from _file_documents(path, tokenizer)
    else:
        yield "\n\n".join(_hub_rows(source, split))


def _file_documents(path: Path, tokenizer: Any) -> Iterator[str]:
    readers: dict[str, Callable[[], Iterable[str]]] = {
        ".txt": lambda: [path.read_text(encoding="utf-8")],
        ".jsonl": lambda: _jsonl_documents(path, tokenizer),
        ".parquet": lambda: _parquet_documents(path, tokenizer),
    }
    if path.suffix not in readers:
        raise DataError(f"corpus {path} must be a folder or a file of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    try:
        yield from readers[path.suffix]()
    except OSError as error:
        raise DataError(f"corpus {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"corpus {path} must be UTF-8: {error}") from None


def _jsonl_documents(path: Path, tokenizer: Any) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"corpus {path}, line {number} is no JSON: {error.msg}") from None
                yield _row_text(row, tokenizer, f"{path}, line {number}")


def _parquet_documents(path: Path, tokenizer: Any) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield _row_text(row, tokenizer, str(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"corpus {path} is no parquet file: {' '.join(str(error).split())}") from None


def _row_text(row: Any, tokenizer: Any, place: str) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not tokenizer.chat_template:
            raise DataError(f"corpus {place} has `messages`, but the tokenizer has no chat template; give `text`")
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    raise DataError(f"corpus {place} must have a field `text` (a string) or `messages` (a list)")


def _hub_rows(source: str, split: str) -> Iterator[str]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, configuration or None)
        wanted = [split, "validation", "train"] if split == "test" else [split]
        chosen = next((side for side in wanted if side in splits), None)
        if chosen is None:
            raise DataError(f"dataset {source} has no split {split}, it has {', '.join(splits)}")
        rows = datasets.load_dataset(name, configuration or None, split=chosen)
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(
            f"corpus {source} is no file or folder here, and not to be had from the hub: {' '.join(str(error).split())}"
        ) from None
    yield from (row["text"] for row in rows)
