"""Figures as PNG files whose bytes depend only on the data."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from facegender.labels import LABELS, NAMES

# Imported in functions: its import fails if MPLBACKEND names a backend that is not installed, and
# `user_settings` corrects that only after a stage's imports.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for colour-blind readers.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_GREY = "#666666"
_LONGEST_NAME = 50  # characters of a group in its drawing


def class_distribution(counts: Mapping[str, int], title: str, path: Path) -> None:
    """Draw the number of images per class (figures 3 and 4 of the study)."""
    figure, axes = _figure(4.5, 3.2)
    bars = axes.bar(list(counts), list(counts.values()), color=[_ORANGE, _BLUE], width=0.6)
    axes.bar_label(bars, padding=2)
    axes.margins(y=0.12)
    axes.set(title=title, ylabel="images", xlabel="label in the dataset")
    _save(figure, path)


def learning_curve(history: pd.DataFrame, metric: str, path: Path) -> None:
    """Draw a training and validation metric by epoch (figures 5 and 6 of the study).

    Args:
        history: one row per epoch, with `epoch`, `kept`, `metric` and `val_{metric}`.
        metric: `loss` or `accuracy`.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(6, 3.6)
    axes.plot(history["epoch"], history[metric], "o-", ms=3, color=_BLUE, label="training")
    axes.plot(
        history["epoch"], history[f"val_{metric}"], "s--", ms=3, color=_RED, label="validation"
    )
    for kept in history.loc[history["kept"] == 1, "epoch"]:
        axes.axvline(kept, color=_GREY, lw=1, ls=":", label=f"the model: epoch {kept}")
    axes.set(title=f"{metric.capitalize()} by epoch", xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Draw the counts of the test split by label and prediction."""
    # Imported here: it takes half a second, which other stages that draw do not need.
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, axes = _figure(4.2, 3.6)
    ConfusionMatrixDisplay.from_predictions(
        labels,
        predicted,
        labels=list(NAMES),
        display_labels=list(LABELS),
        cmap="Blues",
        colorbar=False,
        ax=axes,
    )
    axes.set(
        title=f"Confusion, test split ({len(labels)} images)", xlabel="prediction", ylabel="label"
    )
    _save(figure, path)


def roc_curve(table: pd.DataFrame, auc: float | None, path: Path) -> None:
    """Draw the ROC curve from columns `fpr` and `tpr`."""
    figure, axes = _figure(4.4, 4)
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls=":", label="chance")
    label = "no curve: one class only" if auc is None else f"model, area {auc:.3f}"
    axes.plot(table["fpr"], table["tpr"], color=_BLUE, label=label)
    axes.set(
        title="ROC, test split",
        xlabel="labelled female, called male (rate)",
        ylabel="labelled male, called male (rate)",
        aspect="equal",
    )
    axes.legend(loc="lower right")
    _save(figure, path)


def precision_recall_curve(table: pd.DataFrame, average: float | None, path: Path) -> None:
    """Draw the precision-recall curve of the class male from its columns."""
    figure, axes = _figure(4.4, 4)
    label = "no curve: one class only" if average is None else f"average precision {average:.3f}"
    axes.step(table["recall"], table["precision"], where="post", color=_BLUE, label=label)
    axes.set(
        title="Precision and recall of male, test split",
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    axes.legend(loc="lower left")
    _save(figure, path)


def reliability_diagram(table: pd.DataFrame, ece: float, path: Path) -> None:
    """Draw the share labelled male against P(male), and the images per bin below it."""
    figure = _new_figure(4.4, 4.8)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls=":", label="perfect")
    axes.plot(
        table["probability"],
        table["fraction_male"],
        "o-",
        ms=4,
        color=_BLUE,
        label=f"ECE {ece:.3f}",
    )
    axes.set(title="Calibration, test split", ylabel="share labelled male", xlim=(-0.02, 1.02))
    axes.legend(loc="upper left")
    counts.bar(table["probability"], table["count"], width=0.03, color=_BLUE)
    counts.set(xlabel="P(male)", ylabel="images")
    _save(figure, path)


def group_accuracy(groups: pd.DataFrame, path: Path) -> None:
    """Draw the accuracy of each group of `group_metrics` with its interval."""
    figure, axes = _figure(6.5, max(2.0, 0.24 * len(groups) + 1))
    positions = np.arange(len(groups))[::-1]
    errors = np.stack(
        [groups["accuracy"] - groups["accuracy_low"], groups["accuracy_high"] - groups["accuracy"]]
    ).astype(float)
    axes.errorbar(
        groups["accuracy"],
        positions,
        xerr=errors.clip(0),
        fmt="o",
        ms=4,
        color=_BLUE,
        ecolor=_GREY,
        capsize=2,
    )
    names = [
        f"{_shortened(f'{row.column}: {row.group}')} (n={row.n}{', small' if row.small else ''})"
        for row in groups.itertuples()
    ]
    # Two dollar signs in a name would otherwise start a formula.
    axes.set_yticks(positions, names, fontsize=7, parse_math=False)
    axes.set_ylim(-1, len(names))
    axes.set(
        title="Accuracy by group, test split" if names else "No group columns in the metadata",
        xlabel="accuracy, with 95 % interval",
    )
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _shortened(name: str) -> str:
    """Cut a name in the middle: a long one takes the room of the drawing and of other names."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def face_grid(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    title: str,
    path: Path,
    *,
    threshold: float,
) -> None:
    """Draw faces, five per row, with label and prediction (figures 7 and 8 of the study).

    Args:
        images: uint8 (n, height, width, 3).
        labels: int (n,).
        probabilities: float (n,) of the label male.
    """
    columns = 5
    rows = max(1, -(-len(images) // columns))
    figure = _new_figure(1.7 * columns, 2.0 * rows + 0.5)
    figure.suptitle(title, fontsize=11)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set_axis_off()
        if index >= len(images):
            continue
        label, probability = NAMES[int(labels[index])], float(probabilities[index])
        guess = NAMES[int(probability >= threshold)]
        right = guess == label
        confidence = probability if guess == NAMES[1] else 1 - probability
        axes.imshow(images[index])
        axes.set_title(
            f"{'✓' if right else '✗'} {guess} {confidence:.2f}\nlabel {label}",
            fontsize=8,
            color=_GREEN if right else _RED,
        )
    _save(figure, path)


def most_confident_errors(
    labels: np.ndarray, probabilities: np.ndarray, *, threshold: float, count: int
) -> np.ndarray:
    """Return the indices of up to `count` wrong predictions, the most confident first."""
    wrong = np.flatnonzero((probabilities >= threshold).astype(int) != labels)
    doubt = 1 - np.abs(probabilities[wrong] - labels[wrong])
    return wrong[np.argsort(doubt, kind="stable")][:count]


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure = _new_figure(width, height)
    return figure, figure.subplots()


def _new_figure(width: float, height: float) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # not the user's matplotlibrc
    # Figure, because pyplot keeps global state.
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    # No metadata: it would contain Matplotlib's version.
    figure.savefig(path, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})
