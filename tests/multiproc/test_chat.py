"""A job on conversations through the real launcher, on two ranks: the dense model's loss is what labels give."""

import json
import random

import pytest
import torch

from tests.models import REPOSITORY, model_folder, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.multiproc

# The words of the tiny tokenizer are w2 ... w95: w90 begins a question, w91 a reply, w92 ends both.
TEMPLATE = (
    "{% for message in messages %}{{ 'w91' if message['role'] == 'assistant' else 'w90' }} {{ message['content'] }} "
    "w92 {% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)
SETTINGS = {
    "data.block_tokens": 16,
    "data.max_blocks": 32,
    "data.replies_only": "true",
    "eval.block_tokens": 16,
    "eval.speed_runs": 0,
    "eval.prompts": 0,
    "prune.verify_blocks": 32,
    "stage1.steps": 3,
    "stage2.steps": 3,
}


def conversation(seed):
    draw = random.Random(seed)

    def words(count):
        return " ".join(f"w{draw.randrange(2, 90)}" for _ in range(count))

    roles = ["user", "assistant"] * draw.randint(1, 3)
    return [{"role": role, "content": words(draw.randint(1, 6))} for role in roles]


def test_losses_are_those_of_the_replies(launch, tmp_path):
    model, conversations = tiny_model(num_layers=4), [conversation(seed) for seed in range(60)]
    folder, tokenizer = model_folder(tmp_path / "tiny", model), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    (tmp_path / "chats.jsonl").write_text(rows)
    done = launch(
        REPOSITORY / "launchers/prune.py",
        *("--ds", REPOSITORY / "ds_configs/zero3.json", "--model", folder, "--data", tmp_path / "chats.jsonl"),
        *("--eval-data", tmp_path / "chats.jsonl", "--num-drop", "1", "--no-register", "--output", tmp_path / "out"),
        *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")),
        num_ranks=2,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    ids, labels = [], []
    for messages in conversations:
        for message in messages:
            words = [int(word[1:]) for word in message["content"].split()]
            is_reply = message["role"] == "assistant"
            ids += [91 if is_reply else 90, *words, 92]
            labels += [-100, *words, 92] if is_reply else [-100] * (len(words) + 2)
    num_blocks = len(ids) // 16
    pairs = [torch.tensor(row[: num_blocks * 16]).view(num_blocks, 16) for row in (ids, labels)]
    blocks = [pair for pair in zip(*pairs, strict=True) if (pair[1][1:] >= 0).any()]
    chosen = [blocks[number * len(blocks) // 32] for number in range(32)]
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=label[None]).loss.item() for row, label in chosen]
    selection = json.loads((tmp_path / "out/selection.json").read_text())
    assert selection["loss_dense"] == pytest.approx(sum(losses) / 32, rel=1e-5)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["corpora"]["chats"]["num_windows"] == num_blocks, "all of it is measured"
