"""Conversations: the template's text, which tokens are replies by either way of finding them, and what then counts."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY, distillation_loss, engine, job, logits, tiny_model
from tsp import documents as documents_module
from tsp.chat import rendered, reply_marks
from tsp.config import load_config
from tsp.data import load_corpora
from tsp.documents import documents
from tsp.errors import DataError
from tsp.evaluation.perplexity import window_losses
from tsp.losses import lm_loss, task_loss
from tsp.mounted import Mounted
from tsp.targets import IGNORED, marked, share, targets, token_ids
from tsp.training import train

WORDS = ["<s>", "</s>", "system", "user", "assistant", *(f"w{number}" for number in range(80))]
TURN = "{{ message['role'] }} {{ message['content'] }} </s> "
PROMPT = "{% if add_generation_prompt %}assistant {% endif %}"
PLAIN = "{{ bos_token }} {% for message in messages %}" + TURN + "{% endfor %}" + PROMPT
MARKED = (
    "{{ bos_token }} {% for message in messages %}{% if message['role'] == 'assistant' %}assistant "
    "{% generation %}{{ message['content'] }} </s>{% endgeneration %} {% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + PROMPT
)
# Shows thoughts in the last reply only, as families of thinking models do.
THINKING = PLAIN.replace(TURN, TURN + "{% if loop.last %}w79 {% endif %}")
TWO_TURNS = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w5"},
]


@pytest.fixture
def tokenizer():
    """One token a word, and a start of its own before plain text."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="</s>")
    made.chat_template = PLAIN
    return made


def replies(tokenizer, messages):
    """The words that count."""
    text = rendered(tokenizer, messages, "here")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = reply_marks(tokenizer, messages, text, encoded, "here")
    assert len(marks) == len(encoded["input_ids"])
    return [WORDS[token] for token, mark in zip(encoded["input_ids"], marks, strict=True) if mark]


def config_for(source, evals=(), **data):
    data = {"source": str(source), "block_tokens": 4, "max_blocks": None, "replies_only": True, **data}
    return load_config([{"data": data}, {"eval": {"sources": [str(one) for one in evals], "block_tokens": 4}}])


def write(path, *conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by marks"])
def test_replies_are_found_with_what_ends_them(tokenizer, template):
    tokenizer.chat_template = template
    assert replies(tokenizer, TWO_TURNS) == ["w3", "w4", "</s>", "w5", "</s>"]
    assert replies(tokenizer, TWO_TURNS[:2]) == []


def test_a_template_that_renders_starts_otherwise_needs_marks(tokenizer):
    tokenizer.chat_template = THINKING
    with pytest.raises(DataError, match=r"corpus here: message 3 cannot be told .* marks replies with \{% generation"):
        replies(tokenizer, TWO_TURNS)


def test_messages_that_the_template_refuses_are_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="corpus here: the chat template does not take these messages: roles must"):
        rendered(tokenizer, TWO_TURNS, "here")


def both(config, tokenizer):
    corpora = load_corpora(config, tokenizer, 64)
    (measured,) = corpora.evals
    return corpora.calibration, measured


def test_special_tokens_are_the_templates_own_and_not_added_twice(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", TWO_TURNS)
    calibration = load_corpora(
        config_for(source, [source], block_tokens=18, replies_only=False), tokenizer, 64
    ).calibration
    expected = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True)["input_ids"]
    assert calibration.blocks.tolist() == [expected]
    assert expected.count(0) == 1


def test_the_model_reads_all_and_learns_replies_and_plain_text(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": TWO_TURNS}) + "\n" + json.dumps({"text": "w6 w7 w8 w9 w10"}) + "\n"
    )
    calibration, measured = both(config_for(tmp_path / "a.jsonl", [tmp_path / "a.jsonl"]), tokenizer)
    all_ids = measured.blocks
    assert (all_ids >= 0).all(), "what is measured on counts whole"
    with_replies = [
        row for row in all_ids.tolist() if set(row[1:]) & {WORDS.index(w) for w in ("w4", "w5", "w6", "w8")}
    ]
    assert token_ids(calibration.blocks).tolist() == with_replies
    counted = [WORDS[token] for token in calibration.blocks.flatten().tolist() if token >= 0]
    assert counted == ["w3", "w4", "</s>", "w5", "</s>", "<s>", "w6", "w7", "w8", "w9", "w10"]


def test_what_is_held_out_of_conversations_counts_whole(tokenizer, tmp_path):
    many = [[{"role": "user", "content": f"w{n} w1"}, {"role": "assistant", "content": f"w{n}"}] for n in range(70)]
    calibration, held_out = both(config_for(write(tmp_path / "a.jsonl", *many)), tokenizer)
    assert (calibration.blocks < 0).any()
    assert (held_out.blocks >= 0).all()
    one = write(tmp_path / "one.jsonl", [message for messages in many for message in messages])
    calibration, held_out = both(config_for(one), tokenizer)
    assert (calibration.blocks < 0).any()
    assert (held_out.blocks >= 0).all()


def test_nothing_to_learn_is_an_error(tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "w0 w1 w2 w3"}))
    with pytest.raises(DataError, match=r"replies_only is for rows with `messages`, corpus .*text.jsonl has none"):
        load_corpora(config_for(tmp_path / "text.jsonl", [tmp_path / "text.jsonl"]), tokenizer, 64)
    silent = write(tmp_path / "silent.jsonl", TWO_TURNS[:2])
    with pytest.raises(DataError, match="has no block with an assistant's reply"):
        load_corpora(config_for(silent, [silent]), tokenizer, 64)


def test_rows_of_the_hub_may_be_conversations(tokenizer, monkeypatch):
    import datasets

    rows = {"chats": [{"messages": TWO_TURNS}] * 2, "texts": [{"text": "w0"}, {"text": "w1"}], "none": [{"body": "w0"}]}
    monkeypatch.setattr(documents_module, "_hub_rows", lambda source, split: datasets.Dataset.from_list(rows[source]))
    chats = list(documents("chats", tokenizer, "train"))
    assert [document.text for document in chats] == [rendered(tokenizer, TWO_TURNS, "")] * 2
    assert [document.text for document in documents("texts", tokenizer, "train")] == ["w0\n\nw1"]
    with pytest.raises(DataError, match="corpus none, row 1 must have a field `text`"):
        list(documents("none", tokenizer, "train"))


# What counts, in the losses.


def some_marked(num_blocks=8, block_tokens=12, seed=0):
    """Tokens `[N, T]` of which another share counts in each row, one at least."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (num_blocks, block_tokens), generator=generator)
    counts = torch.rand(ids.shape, generator=generator) < torch.linspace(0.05, 0.9, num_blocks)[:, None]
    counts[:, 5] = True
    return marked(ids, counts)


def labels_of(tokens):
    """As transformers wants them."""
    return torch.where(tokens < 0, IGNORED, tokens)


def theirs(model, tokens):
    with torch.no_grad():
        return model(input_ids=token_ids(tokens), labels=labels_of(tokens)).loss.item()


def test_marks_are_taken_off_and_read():
    ids, counts = torch.tensor([[0, 5, 7]]), torch.tensor([[False, True, False]])
    tokens = marked(ids, counts)
    assert torch.equal(token_ids(tokens), ids)
    assert targets(tokens).tolist() == [[5, IGNORED]]
    assert share(tokens) == 0.5
    assert torch.equal(marked(ids, torch.ones_like(counts)), ids)


def test_the_loss_is_that_of_transformers_with_the_same_labels():
    model, tokens = tiny_model(num_layers=2), some_marked()
    ours = lm_loss(logits(model, token_ids(tokens)), tokens, share(tokens))
    assert ours.item() == pytest.approx(theirs(model, tokens), rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_micro_batches_add_up_to_the_mean_over_all_tokens_that_count(accumulation):
    config, model, tokens = job(train__accumulation=accumulation), tiny_model(num_layers=2), some_marked()
    head = model.lm_head.weight.requires_grad_(True)
    mounted = Mounted(model, None, accumulation)
    stats = train(
        engine(config),
        mounted,
        tokens,
        config.train,
        num_steps=1,
        seed=0,
        loss=lambda batch, share: {"total": lm_loss(mounted(batch), batch, share)},
    )
    [step] = stats
    assert step.losses["total"] == pytest.approx(theirs(model, tokens), rel=1e-5)
    [wanted] = torch.autograd.grad(model(input_ids=token_ids(tokens), labels=labels_of(tokens)).loss, head)
    torch.testing.assert_close(head.grad, wanted, atol=1e-6, rtol=1e-4)


def test_parts_of_a_step_on_several_ranks_have_its_mean():
    model, tokens = tiny_model(num_layers=2), some_marked()
    parts = [lm_loss(logits(model, token_ids(part)), part, share(tokens)).item() for part in tokens.chunk(4)]
    assert sum(parts) / 4 == pytest.approx(theirs(model, tokens), rel=1e-5)


def test_distillation_is_the_mean_over_the_positions_that_predict_what_counts():
    dense, state, tokens = tiny_model(num_layers=2), tiny_model(num_layers=2, seed=1), some_marked()
    teacher, student = (logits(model, token_ids(tokens)) for model in (dense, state))
    kls = [
        float((p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum())
        for p_row, q_row, row in zip(teacher, student, tokens, strict=True)
        for p, q, following in zip(p_row[:-1], q_row[:-1], row[1:], strict=True)
        if following >= 0
    ]
    parts = [
        task_loss(s, part, share(tokens), teacher_BTV=t).distill.item()
        for s, t, part in zip(student.chunk(4), teacher.chunk(4), tokens.chunk(4), strict=True)
    ]
    assert sum(parts) / 4 == pytest.approx(sum(kls) / len(kls), rel=1e-5)


def test_where_all_tokens_count_the_losses_are_what_they_were():
    model, ids = tiny_model(num_layers=2), token_ids(some_marked())
    found = logits(model, ids)
    assert lm_loss(found, ids, share(ids)).item() == pytest.approx(theirs(model, ids), rel=1e-6)
    ours = task_loss(found, ids, share(ids), teacher_BTV=torch.zeros_like(found), temperature=2.0).distill
    assert ours.item() == pytest.approx(distillation_loss(found, torch.zeros_like(found), 2.0).item(), rel=1e-6)


def test_layers_are_judged_by_what_counts():
    """The losses of windows, by which selections are measured."""
    model, tokens = tiny_model(num_layers=2), some_marked()
    losses = window_losses(Mounted(model, None, 1), tokens, batch_size=3)
    assert losses.tolist() == pytest.approx([theirs(model, row[None]) for row in tokens], rel=1e-5)
