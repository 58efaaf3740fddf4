"""Where tables and lines for a person are printed."""

from typing import TextIO

from rich.console import Console

_FILE_WIDTH = 400
"""Characters of a line where stdout is no terminal: nothing is cut or folded."""


def console(stdout: TextIO) -> Console:
    """As wide as the terminal; text is printed as it is, square brackets too."""
    return Console(file=stdout, highlight=False, markup=False, width=None if stdout.isatty() else _FILE_WIDTH)
