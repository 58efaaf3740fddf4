"""Corpora: each kind of file, splits that stay, blocks, fingerprints, and one clear error for each fault."""

import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tsp.config import load_config
from tsp.data import Corpus, corpus_name, evenly_spread, load_corpora, load_evaluation
from tsp.demo.corpus import SPLITS, stdlib_documents, stdlib_split
from tsp.errors import DataError

BOS, UNKNOWN = 0, 1
WORDS = [f"w{number}" for number in range(50)]
TEMPLATE = "{{ bos_token }} {% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, `<s>` before each document."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def ids(text):
    return [BOS, *(WORDS.index(word) + 2 for word in text.split())]


def config_for(source="corpus.txt", evals=(), block_tokens=4, **data):
    return load_config(
        [
            {"data": {"source": str(source), "block_tokens": block_tokens, "max_blocks": None, **data}},
            {"eval": {"sources": [str(one) for one in evals], "block_tokens": block_tokens}},
        ]
    )


def evaluated(tokenizer, *sources, **given):
    return load_evaluation(config_for(evals=sources, **given), tokenizer, max_positions=64)


def message_of(tokenizer, source, **given):
    with pytest.raises(DataError) as caught:
        evaluated(tokenizer, source, **given)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_file_is_one_document_read_as_it_is(tokenizer, tmp_path):
    (tmp_path / "wiki.test.txt").write_text("w0 w1\n\nw2 w3 w4\n w5 w6\n")
    (corpus,) = evaluated(tokenizer, tmp_path / "wiki.test.txt")
    assert corpus.name == "wiki.test"
    assert corpus.blocks.tolist() == [ids("w0 w1 w2 w3 w4 w5 w6")[:4], ids("w0 w1 w2 w3 w4 w5 w6")[4:]]
    assert corpus.blocks.dtype == torch.int64


def test_tail_that_fills_no_block_is_dropped(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS[:10]))
    (corpus,) = evaluated(tokenizer, tmp_path / "a.txt")
    assert corpus.blocks.flatten().tolist() == ids(" ".join(WORDS[:10]))[:8]


def test_each_row_is_a_document_with_its_own_start(tokenizer, tmp_path):
    texts = ["w0 w1 w2", "w3 w4", "w5 w6 w7 w8"]
    expected = [token for text in texts for token in ids(text)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    for corpus in evaluated(tokenizer, tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        assert corpus.blocks.flatten().tolist() == expected


def test_messages_go_through_the_chat_template(tokenizer, tmp_path, monkeypatch):
    row = {"messages": [{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w2"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    assert "no chat template" in message_of(tokenizer, tmp_path / "chat.jsonl")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    (corpus,) = evaluated(tokenizer, tmp_path / "chat.jsonl")
    assert corpus.blocks.tolist() == [ids("w0 w1 w2")]


def test_folder_is_all_its_files_in_order_of_their_paths(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("w3 w4 w5")
    (folder / "a.jsonl").write_text('{"text": "w0 w1 w2"}')
    (folder / "sub" / "c.txt").write_text("w6 w7 w8")
    (folder / "notes.md").write_text("w9 w9 w9")
    (corpus,) = evaluated(tokenizer, folder)
    assert corpus.name == "texts"
    assert corpus.blocks.tolist() == [ids("w0 w1 w2"), ids("w3 w4 w5"), ids("w6 w7 w8")]


def test_corpora_stand_in_the_order_of_the_command_line(tokenizer, tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text("w0 w1 w2 w3")
    found = evaluated(tokenizer, *(tmp_path / f"{name}.txt" for name in ("b", "a", "c")))
    assert [corpus.name for corpus in found] == ["b", "a", "c"]


def test_two_corpora_of_one_name_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w0 w1 w2 w3")
    (tmp_path / "a.jsonl").write_text('{"text": "w0 w1 w2 w3"}')
    with pytest.raises(DataError, match=r"must differ in name .* got a, a"):
        evaluated(tokenizer, tmp_path / "a.txt", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("dir/wiki.test.txt", "wiki.test"),
        ("Salesforce/wikitext:wikitext-2-raw-v1", "wikitext"),
        ("stdlib", "stdlib"),
        ("some/c4.parquet", "c4"),
    ],
)
def test_name_of_a_corpus(source, name):
    assert corpus_name(source) == name


def both(config, tokenizer, max_positions):
    corpora = load_corpora(config, tokenizer, max_positions)
    (held_out,) = corpora.evals
    return corpora.calibration, held_out


def test_single_document_is_split_by_position(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 2))
    calibration, held_out = both(config_for(tmp_path / "a.txt", block_tokens=2), tokenizer, 64)
    tokens = ids(" ".join(WORDS * 2))
    assert len(tokens) == 101
    assert calibration.blocks.flatten().tolist() == tokens[:90]
    assert held_out.blocks.flatten().tolist() == tokens[91:]


def test_many_documents_are_split_by_their_own_hash(tokenizer, tmp_path):
    texts = [f"{a} {b} w0" for a in WORDS for b in WORDS[:20]]

    def sides(order):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        calibration, held_out = both(config_for(tmp_path / "a.jsonl"), tokenizer, 64)
        return [{tuple(row) for row in corpus.blocks.tolist()} for corpus in (calibration, held_out)]

    calibration, held_out = sides(texts)
    assert not calibration & held_out
    assert calibration | held_out == {tuple(ids(text)) for text in texts}
    assert 60 <= len(held_out) <= 150
    # A document stays on its side, wherever it stands and whatever else there is.
    fewer_calibration, fewer_held_out = sides(texts[::-1][:500])
    assert fewer_calibration <= calibration
    assert fewer_held_out <= held_out


def test_tuning_text_is_of_documents_of_its_own(tokenizer, tmp_path):
    texts = [f"{a} {b} w0" for a in WORDS for b in WORDS[:20]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plain = load_corpora(config_for(tmp_path / "a.jsonl"), tokenizer, 64)
    given = config_for(tmp_path / "a.jsonl").model_dump()
    tuned = load_corpora(load_config([given, {"data": {"tuning_blocks": 1000}}]), tokenizer, 64)
    sides = [tuned.calibration, tuned.tuning, *tuned.evals]
    rows = [{tuple(row) for row in corpus.blocks.tolist()} for corpus in sides]
    assert rows[0] | rows[1] == {tuple(row) for row in plain.calibration.blocks.tolist()}
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(texts)
    assert 60 <= len(rows[1]) <= 150
    assert torch.equal(tuned.evals[0].blocks, plain.evals[0].blocks)


def test_tuning_text_of_a_single_document_stands_before_what_is_held_out(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 2))
    given = config_for(tmp_path / "a.txt", block_tokens=2).model_dump()
    tuned = load_corpora(load_config([given, {"data": {"tuning_blocks": 4}}]), tokenizer, 64)
    tokens = ids(" ".join(WORDS * 2))
    assert tuned.calibration.blocks.flatten().tolist() == tokens[:80]
    assert tuned.tuning.blocks.flatten().tolist() == [
        token for start in (81, 83, 85, 87) for token in tokens[start : start + 2]
    ]
    (tmp_path / "b.txt").write_text("w0 w1 w2 w3 w4")
    short = config_for(tmp_path / "b.txt", [tmp_path / "a.txt"], block_tokens=2).model_dump()
    with pytest.raises(DataError, match="0 tokens in the tenth for data.tuning_blocks, less than one block"):
        load_corpora(load_config([short, {"data": {"tuning_blocks": 4}}]), tokenizer, 64)


def test_a_name_holds_what_mlflow_takes(tmp_path):
    assert corpus_name("texts/wiki (1), neu+ä.txt") == "wiki _1__ neu_ä"
    assert corpus_name("someone/some@data:part") == "some_data"


def test_a_dataset_that_only_a_script_can_load_is_refused(tokenizer, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Dataset scripts are no longer supported, but found old.py")

    monkeypatch.setattr("datasets.get_dataset_split_names", refuse)
    with pytest.raises(DataError, match=r"not to be had from the hub: Dataset scripts are no longer supported"):
        load_corpora(config_for("someone/old", block_tokens=2), tokenizer, 64)


def test_a_tenth_without_a_document_is_told_from_an_empty_corpus(tokenizer, tmp_path):
    rows = (json.dumps({"text": f"w0 w1 w{number}"}) for number in range(5))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match="has 0 tokens in the tenth that is held out, unless --eval-data names other"):
        load_corpora(config_for(tmp_path / "a.jsonl", block_tokens=2), tokenizer, 64)


def test_with_corpora_to_evaluate_on_nothing_is_held_out(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS[:31]))
    (tmp_path / "b.txt").write_text("w0 w1 w2")
    corpora = load_corpora(config_for(tmp_path / "a.txt", [tmp_path / "b.txt"]), tokenizer, 64)
    calibration, evals = corpora.calibration, corpora.evals
    assert calibration.blocks.numel() == 32
    assert [corpus.name for corpus in evals] == ["b"]


def test_block_length_defaults_to_the_models_positions(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    (corpus,) = load_evaluation(config_for(evals=[tmp_path / "a.txt"], block_tokens=None), tokenizer, max_positions=16)
    assert corpus.blocks.shape == (3, 16)


def test_block_longer_than_the_models_positions_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    with pytest.raises(DataError, match=r"eval\.block_tokens must be at most the model's 16 positions, got 17"):
        load_evaluation(config_for(evals=[tmp_path / "a.txt"], block_tokens=17), tokenizer, max_positions=16)


def test_fewer_blocks_are_spread_evenly():
    blocks = torch.arange(10)[:, None]
    assert evenly_spread(blocks, 4).flatten().tolist() == [0, 2, 5, 7]
    assert evenly_spread(blocks, 1).flatten().tolist() == [0]
    for enough in (None, 10, 11):
        assert evenly_spread(blocks, enough).flatten().tolist() == list(range(10))


def test_max_blocks_is_obeyed_on_both_sides(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 4))
    config = load_config([config_for(tmp_path / "a.txt", max_blocks=3).model_dump(), {"eval": {"max_blocks": 2}}])
    calibration, held_out = both(config, tokenizer, 64)
    assert (len(calibration.blocks), len(held_out.blocks)) == (3, 2)


def test_fingerprint_knows_tokens_and_shape():
    blocks = torch.arange(12).view(3, 4)
    same = Corpus("other", "elsewhere", blocks.clone())
    print_of = Corpus("name", "source", blocks).fingerprint
    assert print_of == same.fingerprint
    assert print_of == hashlib.sha256(b"(3, 4)" + blocks.numpy().tobytes()).hexdigest()[:16]
    changed = blocks.clone()
    changed[2, 3] += 1
    assert len({print_of, Corpus("n", "s", changed).fingerprint, Corpus("n", "s", blocks.view(4, 3)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "has 1 tokens, less than one block of 4"),
        ("short.txt", b"w0 w1", "has 3 tokens, less than one block of 4"),
        ("latin.txt", b"caf\xe9 w0 w1 w2 w3", "must be UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "must be UTF-8"),
        ("broken.jsonl", b'{"text": "w0"}\n{"text":\n', "line 2 is no JSON"),
        ("fields.jsonl", b'{"text": "w0"}\n{"body": "w1"}\n', "line 2 must have a field `text`"),
        ("list.jsonl", b"[1, 2]\n", "must have a field `text`"),
        ("number.jsonl", b'{"text": 3}\n', "must have a field `text`"),
        ("broken.parquet", b"PAR1 no", "is no parquet file"),
        ("table.csv", b"text\nw0\n", "must be a folder or a file of .txt, .jsonl, .parquet, got '.csv'"),
    ],
)
def test_unusable_file_is_refused_with_its_name(tokenizer, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    message = message_of(tokenizer, tmp_path / name)
    assert reason in message
    assert name in message


def test_parquet_without_text_is_refused(tokenizer, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["w0"]}), tmp_path / "a.parquet")
    assert "must have a field `text`" in message_of(tokenizer, tmp_path / "a.parquet")


def test_missing_file_is_refused_and_not_looked_for_on_the_hub(tokenizer):
    for source in ("none.txt", "./none", "/none/at/all", "~/none"):
        assert source.lstrip("./~") in message_of(tokenizer, source)


def test_folder_without_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "has no file of .txt, .jsonl, .parquet" in message_of(tokenizer, tmp_path / "folder")


def test_unreachable_hub_dataset_is_refused(tokenizer):
    assert "no file or folder here, and not to be had from the hub" in message_of(tokenizer, "nobody/nothing")


def test_empty_jsonl_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    config = config_for(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="less than one block"):
        load_corpora(config, tokenizer, 64)


# The same module is on the same side in every Python version, and was on it when the demo model was trained.
@pytest.mark.parametrize(
    ("module", "split"),
    [
        ("argparse", "train"),
        ("ast", "train"),
        ("asyncio.base_events", "held-out"),
        ("collections", "train"),
        ("dataclasses", "train"),
        ("email.message", "train"),
        ("json.decoder", "train"),
        ("typing", "train"),
        ("zipfile", "train"),
    ],
)
def test_side_of_a_module_stays(module, split):
    assert stdlib_split(module) == split


def test_sides_of_the_standard_library_share_no_module():
    modules = {split: {name for name, _ in stdlib_documents(split)} for split in SPLITS}
    sizes = {split: len(names) for split, names in modules.items()}
    assert len(set.union(*modules.values())) == sum(sizes.values())
    assert all(size >= 20 for size in sizes.values())
    assert sizes["train"] > 5 * max(sizes["calibration"], sizes["held-out"])
    names = set.union(*modules.values())
    assert {"argparse", "email.message", "zipfile"} <= names
    assert not [name for name in names if set(name.split(".")) & {"test", "tests", "site-packages", "idle_test"}]


def test_stdlib_calibrates_and_measures_on_different_modules(tokenizer):
    calibration, held_out = both(config_for("stdlib", block_tokens=64), tokenizer, 64)
    assert calibration.name == held_out.name == "stdlib"
    assert calibration.fingerprint != held_out.fingerprint
