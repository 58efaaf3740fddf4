"""What a job will do, said before it starts: `--dry-run` prints it."""

from dataclasses import asdict, dataclass

from tsp.config import JobConfig, bound_of, number_to_drop
from tsp.data import Corpus
from tsp.methods import TRANSFERS, is_learned
from tsp.source import Source


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a job."""

    model: str
    num_layers: int
    num_drop: int | None
    """None: the job finds it, under `bound`."""
    bound: str | None
    """Steps and tokens are then those of one number that is tried (greedy gates: of a single layer)."""
    ranks: int
    zero_stage: int
    parameters: int
    weights_gib_per_rank: float
    calibration: str
    evaluation: str
    stage1_steps: int
    stage2_steps: int
    tokens_per_step: int
    train_tokens: int


def make_plan(
    config: JobConfig,
    source: Source,
    calibration: Corpus,
    evals: list[Corpus],
    *,
    world_size: int,
    zero_stage: int,
    bytes_per_weight: int,
) -> Plan:
    """From the config and the headers of the model; no weights are read."""
    num_drop = number_to_drop(config.prune, source.num_layers)
    rounds = (num_drop or 1) if config.stage1.schedule == "greedy" else 1
    stage1_steps = rounds * config.stage1.steps if is_learned(config) and config.prune.drop is None else 0
    stage2_steps = config.stage2.steps if TRANSFERS[config.transfer].trains else 0
    tokens_per_step = config.train.batch_size * calibration.blocks.shape[1]
    shards = world_size if zero_stage == 3 else 1
    return Plan(
        model=source.name,
        num_layers=source.num_layers,
        num_drop=num_drop,
        bound=bound_of(config.prune),
        ranks=world_size,
        zero_stage=zero_stage,
        parameters=source.num_parameters,
        weights_gib_per_rank=round(source.num_parameters * bytes_per_weight / shards / 2**30, 4),
        calibration=describe(calibration),
        evaluation="; ".join(describe(corpus) for corpus in evals),
        stage1_steps=stage1_steps,
        stage2_steps=stage2_steps,
        tokens_per_step=tokens_per_step,
        train_tokens=(stage1_steps + stage2_steps) * tokens_per_step,
    )


def describe(corpus: Corpus) -> str:
    """`wikitext: 128 blocks of 2048 tokens, fingerprint 0123456789abcdef`."""
    num_blocks, block_tokens = corpus.blocks.shape
    return f"{corpus.name}: {num_blocks} blocks of {block_tokens} tokens, fingerprint {corpus.fingerprint}"


def as_dict(plan: Plan) -> dict[str, object]:
    """For printing and logging."""
    return asdict(plan)
