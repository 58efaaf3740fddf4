"""Measurements of a model in memory: dense, with layers bypassed, or pruned."""
