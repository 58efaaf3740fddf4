"""What `deepspeed` starts on each rank: `deepspeed launchers/tune.py --minutes 8 [options]`."""

from tsp.cli_tune import launched_tune
from tsp.exits import run_launched

if __name__ == "__main__":
    run_launched(launched_tune)
