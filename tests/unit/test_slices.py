"""Slices: which token belongs to which, by hand; and one clear error for each fault."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import model_folder, tiny_model
from tsp.config import load_config
from tsp.data import load_corpora, load_evaluation
from tsp.errors import DataError
from tsp.slices import MAX_SLICES, Document, Slice, read_slices, token_marks

WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, `<s>` before each document."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def slices_file(path, **slices):
    path.write_text(json.dumps(slices))
    return path


def evaluated(tokenizer, slices, *sources, block_tokens=4, max_blocks=None):
    settings = {"block_tokens": block_tokens, "max_blocks": max_blocks, "slices": slices and str(slices)}
    config = load_config([{"eval": {"sources": [str(one) for one in sources], **settings}}])
    return load_evaluation(config, tokenizer, max_positions=64)


def marked(corpus, name):
    """The words that a slice holds, in order."""
    return " ".join("<s>" if token == 0 else WORDS[token - 2] for token in corpus.blocks[corpus.slices[name]].tolist())


def test_by_file_each_token_of_a_matching_path(tokenizer, tmp_path):
    (tmp_path / "texts" / "legal").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("w0 w1 w2")
    (tmp_path / "texts" / "legal" / "b.txt").write_text("w3 w4 w5")
    (tmp_path / "texts" / "legal" / "c.jsonl").write_text('{"text": "w6 w7 w8"}')
    slices = slices_file(tmp_path / "s.yaml", law={"file": "legal/*"}, text={"file": "*.txt"}, first={"file": "a.txt"})
    (corpus,) = evaluated(tokenizer, slices, tmp_path / "texts")
    assert marked(corpus, "law") == "<s> w3 w4 w5 <s> w6 w7 w8"
    assert marked(corpus, "text") == "<s> w0 w1 w2 <s> w3 w4 w5"
    assert marked(corpus, "first") == "<s> w0 w1 w2"


def test_by_field_rows_with_all_the_values(tokenizer, tmp_path):
    rows = [
        {"text": "w0 w1 w2", "lang": "de", "year": 2024},
        {"text": "w3 w4 w5", "lang": "de", "year": 2023},
        {"text": "w6 w7 w8", "lang": "en"},
        {"text": "w9 w10 w11", "lang": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    german, new = {"field": {"lang": "de"}}, {"field": {"lang": "de", "year": 2024}}
    slices = slices_file(tmp_path / "s.yaml", german=german, new=new, none={"field": {"lang": None}})
    (corpus,) = evaluated(tokenizer, slices, tmp_path / "a.jsonl")
    assert marked(corpus, "german") == "<s> w0 w1 w2 <s> w3 w4 w5"
    assert marked(corpus, "new") == "<s> w0 w1 w2"
    assert marked(corpus, "none") == "<s> w9 w10 w11", "a field that is missing is not one that is null"


def test_by_regex_the_paragraphs_in_which_it_is_found(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w0 w1\nw2 w3\n\nw4 w5\n \t\n\nw6 w7 w1 w8\n")
    slices = slices_file(tmp_path / "s.yaml", ones={"regex": r"\bw1\b"}, fours={"regex": "w4 w5$"})
    (corpus,) = evaluated(tokenizer, slices, tmp_path / "a.txt", block_tokens=11)
    assert marked(corpus, "ones") == "w0 w1 w2 w3 w6 w7 w1 w8"
    assert marked(corpus, "fours") == "w4 w5"


@pytest.mark.parametrize("text", ["", "\n\n", "one", "one\n\ntwo", "\n one\n\n\n\ntwo \nthree\n \nfour\n"])
def test_paragraphs_are_what_stands_between_blank_lines(text):
    """With one token a character, against a split by a regular expression."""
    offsets = [(place, place + 1) for place in range(len(text))]
    any_text = Slice(name="any", regex=re.compile(r"\S"))
    marks = token_marks([any_text], Document(text=text, path="", fields={}), len(text), offsets)
    joined = "".join(character if mark else "|" for character, mark in zip(text, marks, strict=True))
    found = [part for part in re.split(r"\|+", joined) if part]
    assert found == [part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", text) if part.strip()]


def test_a_token_that_begins_in_the_gap_belongs_to_the_paragraph_it_ends_in():
    document = Document(text="ab\n\ncd", path="", fields={})
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (2, 4)]
    first, second = (Slice(name=name, regex=re.compile(name)) for name in ("ab", "cd"))
    assert token_marks([first, second], document, 5, offsets) == [0, 1, 2, 2, 0]


def test_each_slice_has_its_own_bit():
    document = Document(text="x", path="a/b.txt", fields={"k": 1})
    many = [Slice(name=str(bit), file="b.txt" if bit % 2 else "c.txt") for bit in range(MAX_SLICES)]
    (mark,) = token_marks(many, document, 1, None)
    assert mark == sum(1 << bit for bit in range(1, MAX_SLICES, 2))
    assert torch.tensor([mark]).item() == mark, "fits an int64"


@pytest.mark.parametrize(
    ("path", "glob", "holds"),
    [
        ("data/legal/b.txt", "legal/*", True),
        ("data/legal/deep/b.txt", "legal/*", True),
        ("data/illegal/b.txt", "legal/*", False),
        ("/data/b.txt", "/data/b.txt", True),
        ("b.txt", "b.*", True),
        ("email/message.py", "email/*", True),
        ("B.txt", "b.txt", False),
    ],
)
def test_a_glob_may_begin_at_any_folder(path, glob, holds):
    assert Slice(name="x", file=glob).holds(Document(text="", path=path, fields={})) is holds


def test_tokens_and_fingerprints_are_the_same_with_and_without_slices(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(WORDS))
    slices = slices_file(tmp_path / "s.yaml", low={"regex": "w[0-4]"}, text={"file": "*.txt"})
    for source in (tmp_path / "a.txt", "stdlib"):
        (with_slices,), (without,) = (evaluated(tokenizer, one, source, block_tokens=8) for one in (slices, None))
        assert torch.equal(with_slices.blocks, without.blocks)
        assert with_slices.fingerprint == without.fingerprint
        assert without.slices == {}
        slices = slices_file(tmp_path / "s.yaml", email={"file": "email/*"}, classes={"regex": "class .*:"})


def test_the_standard_library_is_known_by_its_modules(tokenizer, tmp_path):
    slices = slices_file(tmp_path / "s.yaml", classes={"regex": "^class "}, python={"file": "*.py"})
    (corpus,) = evaluated(tokenizer, slices, "stdlib", block_tokens=32)
    assert corpus.slices["python"].all()
    assert 0 < corpus.slices["classes"].sum() < corpus.blocks.numel() / 4


def test_held_out_text_keeps_its_slices(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(WORDS * 2))
    slices = slices_file(tmp_path / "s.yaml", nines={"regex": "9"})
    settings = {"data": {"source": str(tmp_path / "a.txt"), "block_tokens": 2}}
    (corpus,) = load_corpora(load_config([settings, {"eval": {"slices": str(slices)}}]), tokenizer, 5).evals
    assert corpus.blocks.shape == (2, 5)
    assert marked(corpus, "nines") == "w49"
    assert WORDS[corpus.blocks[1, 4] - 2] == "w49"


def test_fewer_windows_keep_their_own_slices(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(WORDS))
    slices = slices_file(tmp_path / "s.yaml", tens={"regex": r"w\d0"})
    (corpus,) = evaluated(tokenizer, slices, tmp_path / "a.txt", block_tokens=8, max_blocks=3)
    expected = [re.fullmatch(r"w\d0", WORDS[token - 2]) is not None for token in corpus.blocks.flatten().tolist()]
    assert corpus.slices["tens"].flatten().tolist() == expected
    assert any(expected)


def refused(tokenizer, slices, *sources):
    with pytest.raises(DataError) as caught:
        evaluated(tokenizer, slices, *sources)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_slices_that_match_nothing_are_named(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    (tmp_path / "b.txt").write_text(" ".join(WORDS))
    found, gone, lost = {"file": "b.txt"}, {"file": "c.txt"}, {"regex": "zebra"}
    slices = slices_file(tmp_path / "s.yaml", found=found, gone=gone, lost=lost, first={"field": {"text": "x"}})
    message = refused(tokenizer, slices, tmp_path / "a.txt", tmp_path / "b.txt")
    assert "gone, lost, first match nothing in the windows of a, b; mend the file" in message


def test_a_slice_of_one_corpus_is_left_out_of_the_others(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    (tmp_path / "b.txt").write_text(" ".join(WORDS))
    corpora = evaluated(
        tokenizer, slices_file(tmp_path / "s.yaml", b={"file": "b.txt"}), tmp_path / "a.txt", tmp_path / "b.txt"
    )
    assert [list(corpus.slices) for corpus in corpora] == [[], ["b"]]


def test_a_slow_tokenizer_cannot_say_where_its_tokens_stand(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    slices = slices_file(tmp_path / "s.yaml", low={"regex": "w0"})
    assert "need a tokenizer that knows where its tokens stand" in refused(tokenizer, slices, tmp_path / "a.txt")
    evaluated(tokenizer, slices_file(tmp_path / "s.yaml", text={"file": "*.txt"}), tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must map names to one of file, field, regex, got nothing"),
        ("- a", "must map names to one of file, field, regex, got list"),
        ("a: {file: [", "no valid YAML"),
        ("a: {files: x}", "a: must be exactly one of file, field, regex, got files"),
        ("a: {file: x, regex: y}", "a: must be exactly one of file, field, regex, got file, regex"),
        ("a: {}", "a: must be exactly one of file, field, regex, got nothing"),
        ("a: x", "a: must be exactly one of file, field, regex, got str"),
        ("a: {regex: '('}", "a: regex '(' is no pattern: missing )"),
        ("a: {regex: 3}", "a: regex must be a text, got 3"),
        ("a: {field: x}", "a: field must be a mapping, got 'x'"),
        ("a: {field: {}}", "a: field must be a mapping, got {}"),
        ("a/b: {file: x}", "a/b: a name must be of letters"),
        ("a: {files: x}\nb: {regex: '['}", "a: must be exactly one of file, field, regex, got files; b: regex '['"),
        ("\n".join(f"s{n}: {{file: x}}" for n in range(63)), "must have at most 62 slices, got 63"),
    ],
)
def test_what_the_file_may_not_say(tmp_path, text, reason):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        read_slices(str(tmp_path / "s.yaml"))
    assert str(caught.value).startswith(f"--slices {tmp_path / 's.yaml'}: ")
    assert reason in str(caught.value)


def test_a_file_that_is_missing_or_of_bytes_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"caf\xe9: {file: x}")
    for name, reason in (("none.yaml", "No such file"), ("s.yaml", "no UTF-8")):
        with pytest.raises(DataError, match=reason):
            read_slices(str(tmp_path / name))


def test_a_job_with_bad_slices_does_not_start(tmp_path):
    from tsp.job import prepare
    from tsp.options import sharding_path

    model = model_folder(tmp_path / "model", tiny_model(num_layers=3))
    (tmp_path / "a.txt").write_text(" ".join(["w5"] * 400))
    slices = slices_file(tmp_path / "s.yaml", lost={"regex": "zebra"})
    settings = {"model": {"path": str(model)}, "data": {"source": str(tmp_path / "a.txt"), "block_tokens": 8}}
    config = load_config([settings, {"eval": {"block_tokens": 8, "slices": str(slices)}}])
    with pytest.raises(DataError, match="lost match nothing in the windows of a"):
        prepare(config, sharding_path({"ds": None}), None, root=tmp_path, world_size=1)
    assert not (tmp_path / "mlruns").exists()
