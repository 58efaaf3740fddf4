"""A `tokenizer.json` in the words of GGUF: tokens, merges or scores, and how a text is split.

llama.cpp has the ways to split a text built in, and goes by a name. A name is taken only where the tokenizer's own rule
is the one behind it: a text that is split otherwise would be read otherwise, without any error.
"""

import json
import re
from pathlib import Path
from typing import Any

from tsp.errors import ModelError
from tsp.yaml12 import read_yaml

_WORDS = Path(__file__).with_name("gguf_words.yaml")
_BYTE_LEVEL = "ByteLevel"
_SPACE = "\u2581"


def cannot_hold(what: str) -> ModelError:
    """The error that says what there is no GGUF of, and what to do."""
    remedy = "export without it, and convert the folder by llama.cpp's convert_hf_to_gguf.py"
    return ModelError(f"--format gguf cannot hold {what}: {remedy}")


def add_vocabulary(gguf: Any, writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a folder.

    Args:
        gguf: the package.
        writer: a `gguf.GGUFWriter`.
        folder: Hugging Face folder.
        vocab_size: rows of the embedding; numbers without a token are filled up.

    Raises:
        ModelError: there is no `tokenizer.json`, or llama.cpp would split a text otherwise.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise cannot_hold("a model without tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise cannot_hold(f"a tokenizer of type {model['type']}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    by_bytes = not model.get("byte_fallback")
    words = read_yaml(_WORDS)
    if by_bytes:
        writer.add_tokenizer_model(words["bytes"])
        writer.add_tokenizer_pre(_split(tokenizer, words["splits"]))
    else:
        writer.add_tokenizer_model(words["sentencepiece"])
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_space_prefix(tokenizer))
    tokens, types = _tokens(gguf, tokenizer, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not by_bytes:
        # SentencePiece joins what scores highest first; of the merges, the first.
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
    gguf.SpecialVocab(folder, load_merges=by_bytes, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tokens(gguf: Any, tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[Any]]:
    model, kinds = tokenizer["model"], gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[number], types[number] = token, kinds.BYTE if is_byte else kinds.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    if model.get("byte_fallback") and model.get("unk_token"):
        types[tokens.index(model["unk_token"])] = kinds.UNKNOWN
    return tokens, types


def _split(tokenizer: dict[str, Any], splits: list[dict[str, Any]]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits a text."""
    if tokenizer["normalizer"] not in (None, {"type": "NFC"}):
        raise cannot_hold(f"a tokenizer that normalizes by {tokenizer['normalizer']['type']}")
    steps = _steps(tokenizer["pre_tokenizer"])
    rule: Any = None
    if steps and steps[-1]["type"] == _BYTE_LEVEL and not steps[-1]["add_prefix_space"]:
        own, before = steps[-1].get("use_regex", True), steps[:-1]
        if own and not before:
            rule = _BYTE_LEVEL
        elif not own and [step["type"] for step in before] == ["Split"] and before[0]["behavior"] == "Isolated":
            rule = before[0]["pattern"].get("Regex")
    wanted = {"rule": rule, "whole_words_first": bool(tokenizer["model"].get("ignore_merges"))}
    for split in splits:
        if split.items() >= wanted.items():
            return split["name"]
    raise cannot_hold("a tokenizer that splits texts as this one does")


def _has_space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Of a tokenizer that was SentencePiece: whether a text begins with a space of its own."""
    steps = [*_steps(tokenizer["normalizer"]), *_steps(tokenizer["pre_tokenizer"])]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = {"type": "Prepend", "prepend": _SPACE}
    if [step for step in steps if step not in (space, prefix) and step["type"] != "Metaspace"]:
        raise cannot_hold("a tokenizer that splits or normalizes texts as this one does")
    return any(step == prefix or step.get("prepend_scheme", "never") != "never" for step in steps)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step.get("normalizers") or step.get("pretokenizers") or [step]
