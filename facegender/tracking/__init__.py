"""MLflow: where runs are kept."""
