"""Two-stage regularised layer pruning (arXiv 2505.18232); see the method card, README.md, beside this file."""
