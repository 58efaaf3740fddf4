"""What `deepspeed` starts: `deepspeed launchers/evaluate.py --model M --eval-data F [options]`."""

import click

from tsp.cli import evaluate
from tsp.exits import run_launched
from tsp.options import Command

if __name__ == "__main__":
    launched = Command("evaluate", callback=evaluate.callback, params=list(evaluate.params), help=evaluate.help)
    launched.params.append(click.Option(["--local_rank"], type=int, hidden=True, expose_value=False))
    run_launched(launched)
