"""`python -m tsp` is the command `tsp`."""

from tsp.cli import main

main()
