"""One script a stage of dvc.yaml: list, download, split, preprocess, train, evaluate, export."""
