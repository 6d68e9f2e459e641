"""The tables that `dvc plots` draws and the figures of an evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from facegender.data.manifest import write_table
from facegender.data.processed import ProcessedSplit
from facegender.evaluation import metrics as evaluation
from facegender.evaluation import plots


def draw(
    folder: Path,
    test: ProcessedSplit,
    probabilities: np.ndarray,
    history: pd.DataFrame,
    groups: pd.DataFrame,
    metrics: dict[str, Any],
    threshold: float,
) -> None:
    """Write the tables as CSV and the figures as PNG.

    Args:
        probabilities: P(male), float (n,).
        history: training history, one row per epoch.
        groups: table of `group_metrics`.
        metrics: result of `classification_metrics`.
    """
    labels = test.labels
    roc = evaluation.roc_table(labels, probabilities)
    precision_recall = evaluation.precision_recall_table(labels, probabilities)
    reliability = evaluation.reliability_table(labels, probabilities)
    write_table(roc, folder / "roc.csv")
    write_table(precision_recall, folder / "precision_recall.csv")
    write_table(reliability, folder / "reliability.csv")

    plots.learning_curve(history, "loss", folder / "loss.png")
    plots.learning_curve(history, "accuracy", folder / "accuracy.png")
    plots.confusion_matrix(
        labels, (probabilities >= threshold).astype(int), folder / "confusion.png"
    )
    plots.roc_curve(roc, metrics["roc_auc"], folder / "roc.png")
    plots.precision_recall_curve(
        precision_recall, metrics["average_precision"], folder / "precision_recall.png"
    )
    plots.reliability_diagram(reliability, metrics["ece"], folder / "reliability.png")
    plots.group_accuracy(groups, folder / "groups.png")

    # Spread over the split, so that both classes appear.
    spread = np.linspace(0, len(test) - 1, min(20, len(test))).astype(int)
    errors = plots.most_confident_errors(labels, probabilities, threshold=threshold, count=10)
    for name, title, indices in (
        ("faces", "Faces of the test split, with the prediction", spread),
        ("errors", f"Most confident errors ({len(errors)} shown)", errors),
    ):
        plots.face_grid(
            test.images[test.rows[indices]],
            labels[indices],
            probabilities[indices],
            title,
            folder / f"{name}.png",
            threshold=threshold,
        )
