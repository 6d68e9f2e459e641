"""One script a stage of dvc.yaml, in this order: download, split, preprocess, train, evaluate."""
