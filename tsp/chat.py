"""Rows of `messages`: the text that the tokenizer's chat template makes of them, and which of its tokens are replies.

Where the template marks what the model writes (`{% generation %}`), transformers says which tokens those are. Else the
conversation is rendered again up to each reply: what the whole has beyond the prompt for it, up to where the
conversation with it ends, is the reply, with whatever ends a turn.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tsp.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# As transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def rendered(tokenizer: Any, messages: Messages, place: str, *, prompt: bool = False) -> str:
    """A conversation as text, special tokens included.

    Args:
        tokenizer: has the chat template.
        messages: each with `role` and `content`.
        place: where they stand, for messages to the user.
        prompt: end with what introduces the next reply.

    Raises:
        DataError: there is no template, or it does not take these messages.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise DataError(f"corpus {place} has `messages`, but the tokenizer has no chat template; give `text`")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"corpus {place}: the chat template does not take these messages: {' '.join(str(error).split())}"
        ) from None


def reply_marks(tokenizer: Any, messages: Messages, text: str, encoded: Mapping[str, Any], place: str) -> list[bool]:
    """Which tokens of a conversation belong to replies.

    Args:
        tokenizer: a fast one.
        messages: the conversation.
        text: from `rendered`.
        encoded: its `input_ids` and `offset_mapping`.
        place: where it stands, for messages to the user.

    Returns:
        One per token.

    Raises:
        DataError: the template neither marks its replies nor renders a conversation's start as the start of the whole.
    """
    if _GENERATION.search(tokenizer.get_chat_template()):
        found = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert found["input_ids"] == encoded["input_ids"], "the same text, tokenised the same"
        return [bool(mark) for mark in found["assistant_masks"]]
    spans = list(_reply_spans(tokenizer, messages, text, place))
    # A token belongs to what its last character belongs to: a blank before it may be part of it.
    return [start < end and any(a < end <= b for a, b in spans) for start, end in encoded["offset_mapping"]]


def _reply_spans(tokenizer: Any, messages: Messages, text: str, place: str) -> Iterator[tuple[int, int]]:
    """First character of each reply and the one after its last."""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = rendered(tokenizer, messages[:number], place, prompt=True)
        with_reply = rendered(tokenizer, messages[: number + 1], place)
        if not (text.startswith(with_reply) and with_reply.startswith(before)):
            raise DataError(
                f"corpus {place}: message {number + 1} cannot be told from what stands around it, since the chat "
                "template renders the start of a conversation otherwise than in the whole; data.replies_only needs a "
                "template that marks replies with {% generation %}"
            )
        yield len(before), len(with_reply)
