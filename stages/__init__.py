"""One script a stage of dvc.yaml."""
