"""Two-stage regularised layer pruning for large language models, on DeepSpeed, tracked with MLflow."""

__version__ = "0.1.0"
