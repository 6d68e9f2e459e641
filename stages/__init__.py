"""One script a stage of dvc.yaml: download, split, preprocess, train, evaluate, export."""
