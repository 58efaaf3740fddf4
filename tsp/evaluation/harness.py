"""A language model as lm-evaluation-harness wants it, around a forward function; needs the extra `eval`.

Tokens and windows are those of the harness's own `hf` model, so that both give the same numbers on the same weights.
Requests are shared among the ranks as windows of text are; each rank is told all answers, and is a world of its own for
the harness.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from tsp.evaluation.windows import per_window


class ForwardModel(TemplateLM):
    """Scores and continues texts with a forward function."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        tokenizer: Any,
        max_positions: int,
        sharing: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._forward = forward
        self._max_positions = max_positions
        self._sharing = sharing

    @property
    def eot_token_id(self) -> int:
        """End of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Before a text without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the start token gets no second one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in disjoint windows."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_positions,
                context_len=1,
            )
            for piece in map(make_disjoint_window, pieces):
                windows.append((("", ""), *piece))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += loglikelihood
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop sequence, whatever else the task asks for (sampling, beams)."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], 256)
            until = handle_stop_sequences(options.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            continued = self._continue(contexts, min(options["max_gen_toks"], self._max_positions - 1), until)
            for number, tokens in zip(numbers, continued, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, until, None)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """`(text, context, continuation)` each; what differs in the last token only is computed once."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            assert 0 < len(continuation) <= self._max_positions, "the harness cuts what is longer"
            # Too long a context loses its beginning.
            given = (context + continuation)[-(self._max_positions + 1) : -1]
            by_input.setdefault(tuple(given), []).append(number)
        inputs = sorted(by_input, key=len, reverse=True)
        width = max(map(len, by_input.values()))

        def score(rows_b: Tensor) -> Tensor:
            rows = [inputs[row] for row in rows_b.tolist()]
            logits = self._forward(_right_padded(rows, rows_b.device))
            scores = torch.zeros(len(rows), width, 2, dtype=torch.float64, device=logits.device)
            for place, row in enumerate(rows):
                for slot, number in enumerate(by_input[row]):
                    wanted = torch.tensor(requests[number][2], device=logits.device)
                    some = logits[place, len(row) - len(wanted) : len(row)]
                    chosen = some.float().log_softmax(-1).gather(1, wanted[:, None])
                    greedy = (some.argmax(-1) == wanted).all()
                    scores[place, slot] = torch.stack([chosen.sum().double(), greedy.double()])
            return scores.flatten(1)

        options = {**self._sharing, "name": "tasks"}
        scores = per_window(score, torch.arange(len(inputs)), **options).view(len(inputs), width, 2).tolist()
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for row, found in zip(inputs, scores, strict=True):
            for number, (loglikelihood, greedy) in zip(by_input[row], found, strict=False):
                answers[number] = (loglikelihood, bool(greedy))
        return answers

    def _continue(self, contexts: list[list[int]], num_new: int, until: Sequence[str]) -> list[list[int]]:
        """Greedy, without a cache (see `generation.py`), until all texts of all ranks' batches are done."""
        total = self._sharing.get("total", lambda values: values)
        room = self._max_positions - num_new

        def is_done(new: list[int]) -> bool:
            if len(new) == num_new or (new and new[-1] == self.eot_token_id):
                return True
            text = self.tokenizer.decode(new)
            return any(stop and stop in text for stop in until)

        def go_on(rows_b: Tensor) -> Tensor:
            texts = [contexts[row][-room:] for row in rows_b.tolist()]
            new: list[list[int]] = [[] for _ in texts]
            while total(torch.tensor(sum(not is_done(tokens) for tokens in new), device=rows_b.device)):
                rows = [text + tokens for text, tokens in zip(texts, new, strict=True)]
                logits = self._forward(_right_padded(rows, rows_b.device))
                for place, (row, tokens) in enumerate(zip(rows, new, strict=True)):
                    if not is_done(tokens):
                        tokens.append(int(logits[place, len(row) - 1].argmax()))
            padded = [tokens + [-1] * (num_new - len(tokens)) for tokens in new]
            return torch.tensor(padded, device=rows_b.device)

        options = {**self._sharing, "name": "tasks, generation"}
        found = per_window(go_on, torch.arange(len(contexts)), **options).long().tolist()
        return [[token for token in row if token >= 0] for row in found]


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`[b, t]`; no token sees what stands behind it, so it does not matter with what: with the row's last token."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
