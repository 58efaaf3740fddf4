"""The documents of a source: a file or folder of .txt (one document), .jsonl or .parquet (one document a row), a
dataset on the hub (its rows joined by blank lines, or one document a row of `messages`), or `stdlib`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tsp.chat import rendered
from tsp.demo.corpus import stdlib_documents
from tsp.errors import DataError
from tsp.slices import Document

SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(source: str, tokenizer: Any, split: str) -> Iterator[Document]:
    """The texts of a source, in an order that stays.

    Args:
        source: as on the command line.
        tokenizer: has the chat template for rows of `messages`.
        split: `train` or `test`; of a dataset on the hub, and of `stdlib`.

    Raises:
        DataError: missing or unreadable.
    """
    path = Path(source)
    if source == "stdlib":
        for name, text in stdlib_documents("calibration" if split == "train" else "held-out"):
            yield Document(text=text, path=f"{name.replace('.', '/')}.py", fields={})
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"corpus folder {source} has no file of {', '.join(SUFFIXES)}")
        for file in files:
            yield from _of_file(file, tokenizer)
    elif path.exists() or path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        yield from _of_file(path, tokenizer)
    else:
        yield from _of_hub(source, tokenizer, split)


def _of_file(path: Path, tokenizer: Any) -> Iterator[Document]:
    readers: dict[str, Callable[[], Iterable[Document]]] = {
        ".txt": lambda: [Document(text=path.read_text(encoding="utf-8"), path=path.as_posix(), fields={})],
        ".jsonl": lambda: _of_jsonl(path, tokenizer),
        ".parquet": lambda: _of_parquet(path, tokenizer),
    }
    if path.suffix not in readers:
        raise DataError(f"corpus {path} must be a folder or a file of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    try:
        yield from readers[path.suffix]()
    except OSError as error:
        raise DataError(f"corpus {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"corpus {path} must be UTF-8: {error}") from None


def _of_jsonl(path: Path, tokenizer: Any) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"corpus {path}, line {number} is no JSON: {error.msg}") from None
                yield _of_row(row, tokenizer, path.as_posix(), f"{path}, line {number}")


def _of_parquet(path: Path, tokenizer: Any) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield _of_row(row, tokenizer, path.as_posix(), str(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"corpus {path} is no parquet file: {' '.join(str(error).split())}") from None


def _of_row(row: Any, tokenizer: Any, path: str, place: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Document(text=row["text"], path=path, fields=row, place=place)
    if isinstance(row, dict) and _is_chat(row.get("messages")):
        text = rendered(tokenizer, row["messages"], place)
        return Document(text=text, path=path, fields=row, place=place, is_chat=True)
    raise DataError(f"corpus {place} must have a field `text` (a string) or `messages` (a list of objects)")


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(isinstance(message, dict) for message in messages)


def _of_hub(source: str, tokenizer: Any, split: str) -> Iterator[Document]:
    rows = _hub_rows(source, split)
    if "text" in rows.column_names:
        yield Document(text="\n\n".join(rows["text"]), path=source, fields={}, place=source)
    else:
        for number, row in enumerate(rows, start=1):
            yield _of_row(row, tokenizer, source, f"{source}, row {number}")


def _hub_rows(source: str, split: str) -> Any:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, configuration or None)
        wanted = [split, "validation", "train"] if split == "test" else [split]
        chosen = next((side for side in wanted if side in splits), None)
        if chosen is None:
            raise DataError(f"dataset {source} has no split {split}, it has {', '.join(splits)}")
        return datasets.load_dataset(name, configuration or None, split=chosen)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"corpus {source} is no file or folder here, and not to be had from the hub: {' '.join(str(error).split())}"
        ) from None
