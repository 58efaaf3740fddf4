"""What `deepspeed` starts on each rank: `deepspeed launchers/prune.py --ds ds_configs/zero3.json [options]`."""

from tsp.cli import launched_prune
from tsp.exits import run_launched

if __name__ == "__main__":
    run_launched(launched_prune)
