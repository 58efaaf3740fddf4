"""What `deepspeed` starts: `deepspeed launchers/monitor.py models:/NAME@ALIAS --against M --requests F --ds D`."""

import click

from tsp.cli_monitor import monitor
from tsp.exits import run_launched
from tsp.options import Command

if __name__ == "__main__":
    launched = Command("monitor", callback=monitor.callback, params=list(monitor.params), help=monitor.help)
    launched.params.append(click.Option(["--local_rank"], type=int, hidden=True, expose_value=False))
    run_launched(launched)
