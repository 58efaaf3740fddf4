"""The embedded demo: a small trained Llama checkpoint and its corpus, so that a first run needs no download."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "model"
NAME = "demo"
"""What results call the model."""
