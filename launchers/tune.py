"""What `deepspeed` starts on each rank: `deepspeed launchers/tune.py --minutes 8 [options]`."""

from tsp.cli_tune import launched_tune

if __name__ == "__main__":
    launched_tune()
