"""`tsp plan`: what a job will cost, without its weights and without its hardware."""

import json
from typing import Any

import click

from tsp.errors import ConfigError
from tsp.exits import exit_codes, stdout_kept_clean
from tsp.options import Command, configs_from_options, sharding_path, trial_options


@click.command(cls=Command)
@trial_options
@click.option("--nodes", type=click.IntRange(1, 4096), default=1, show_default=True, help="Machines.")
@click.option("--gpus", type=click.IntRange(1, 64), default=1, show_default=True, help="GPUs of each.")
@click.option(
    "--gpu", default="h100-80", show_default=True, metavar="NAME|FILE.yaml", help="h100-80, a100-80, h200, l40s."
)
@click.option(
    "--calibrate", is_flag=True, help="Measure this machine first, with a few layers of the model; use it as GPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def plan(nodes: int, gpus: int, gpu: str, calibrate: bool, as_json: bool, **options: Any) -> None:
    """Say what a job will cost before it runs: memory by part, time, traffic, disk; only config.json is read.

    Exit code 3 where it does not fit.
    """
    with exit_codes(debug=options["debug"]), stdout_kept_clean() as stdout:
        ((_, config), *more) = configs_from_options(options | {"register": None, "no_register": True})
        if more:
            raise ConfigError("a plan is for a single job, got a sweep; leave the comma lists out")
        from tsp.calibrate import gpu_dtype, measured_device, own_dtype
        from tsp.capacity import Estimate, Fleet, as_dict
        from tsp.config import known_gpu
        from tsp.footprint import shape_of
        from tsp.report_plan import print_estimate
        from tsp.sharding import read_json, resolve

        content = read_json(sharding_path(options))
        shape = shape_of(config.model)
        dtype = own_dtype(config) if calibrate else gpu_dtype(config)
        ranks = nodes * gpus
        sharding = resolve(content, config, world_size=ranks, hidden_size=shape.hidden_size, dtype=dtype)
        device = measured_device(shape, config, content) if calibrate else known_gpu(gpu)
        fleet = Fleet(nodes=nodes, gpus=gpus, gpu=device)
        document = as_dict(Estimate(config, shape, sharding, fleet, dtype=dtype))
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_estimate(document, stdout)
    raise SystemExit(0 if document["fits"] else 3)
