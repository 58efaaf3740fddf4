"""Everything that touches MLflow: the store, the spool, the run, the registry. No other package imports mlflow."""
