"""Everything that is measured on one state of a model in memory: `evaluate_state`, in a job and in `tsp evaluate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tsp.config import EvalConfig
from tsp.data import Corpus
from tsp.evaluation.generation import greedy_continuations, prompts_of
from tsp.evaluation.predictions import Reference, measure_predictions
from tsp.evaluation.speed import prompt_of, prompt_tokens_per_s
from tsp.evaluation.zero_shot import Tasks, task_metrics
from tsp.records import Evaluation


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What every state is measured with. The dense one comes first: the others are compared with it."""

    config: EvalConfig
    corpora: Sequence[Corpus]
    max_positions: int
    """Of the model."""
    sharing: Mapping[str, Any]
    """How the ranks share the work: `engine.Engine.sharing`."""
    tasks: Tasks | None = None
    references: dict[str, Reference] = field(default_factory=dict)
    """By corpus; the dense model's predictions."""

    def alone(self) -> "Exam":
        """The same for this rank without the others; it compares with what it has of the dense model's predictions."""
        sharing = {**self.sharing, "rank": 0, "world_size": 1, "total": lambda values: values}
        return replace(
            self, sharing=sharing, references={name: reference.own() for name, reference in self.references.items()}
        )


def evaluate_state(exam: Exam, forward: Callable[[Tensor], Tensor], state: str) -> Evaluation:
    """Measure one state; the same call on every rank.

    Args:
        exam: what with; remembers the dense model's predictions.
        forward: tokens `[b, t]` -> logits `[b, t, V]`, on the device of `exam.sharing`.
        state: its name; `dense` is what later states are compared with.
    """
    config = exam.config
    perplexities, fidelities, slices = {}, {}, {}
    for corpus in exam.corpora:
        if corpus.name not in exam.references:
            exam.references[corpus.name] = Reference(corpus.blocks, config.compare_positions)
        perplexities[corpus.name], fidelity, slices[corpus.name] = measure_predictions(
            forward,
            corpus,
            exam.references[corpus.name],
            is_dense=state == "dense",
            **exam.sharing,
            name=f"evaluate {_spoken(state)} on {corpus.name}",
        )
        if fidelity is not None:
            fidelities[corpus.name] = fidelity
    first = exam.corpora[0]
    continuations: tuple[tuple[int, ...], ...] = ()
    if config.prompts:
        continuations = greedy_continuations(
            forward,
            first.blocks,
            num_prompts=config.prompts,
            num_new=config.continuation_tokens,
            max_positions=exam.max_positions,
            **exam.sharing,
            name=f"generate {_spoken(state)}",
        )
    return Evaluation(
        perplexity=perplexities,
        prompt_tokens_per_s=prompt_speed(exam, forward),
        fidelity=fidelities,
        slices=slices,
        continuations=continuations,
        prompt_slices=_prompt_slices(exam, first) if config.prompts else {},
        tasks=task_metrics(exam.tasks, forward, exam.sharing) if exam.tasks else {},
    )


def prompt_speed(exam: Exam, forward: Callable[[Tensor], Tensor]) -> float | None:
    """Tokens per second of the exam's prompt; arguments as those of `evaluate_state`. None: not to be measured."""
    if not exam.config.speed_runs:
        return None
    prompt = prompt_of(exam.corpora[0].blocks, exam.max_positions).to(exam.sharing["device"])
    return prompt_tokens_per_s(forward, prompt, exam.config.speed_runs)


def _prompt_slices(exam: Exam, corpus: Corpus) -> dict[str, tuple[int, ...]]:
    """The prompts of each slice: those whose last token, after which the model goes on, belongs to it."""
    last = {
        name: prompts_of(mask_NT, exam.config.prompts, exam.max_positions)[:, -1]
        for name, mask_NT in corpus.slices.items()
    }
    return {name: tuple(held_P.nonzero()[:, 0].tolist()) for name, held_P in last.items()}


def _spoken(state: str) -> str:
    return state.replace("_", " ")
