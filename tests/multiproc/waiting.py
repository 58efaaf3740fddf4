"""What a test starts on each rank: rank 0 works alone for SECONDS, and the others wait for its word."""

import sys
import time

from tests.models import job
from tsp.engine import Engine


def main() -> None:
    engine = Engine.start(job(), {"zero_optimization": {"stage": 0}})
    seconds = float(next(word for word in sys.argv[1:] if not word.startswith("--")))
    word = engine.on_first(lambda: time.sleep(seconds) or "done")
    print(f"rank {engine.rank} heard {word}", flush=True)
    engine.stop()


if __name__ == "__main__":
    main()
