"""Calibration: probabilities that say how often they are right."""

import math

import numpy as np
from sklearn.linear_model import LogisticRegression

from facegender.data.processed import ProcessedSplit
from facegender.model.network import Network
from facegender.model.saved_model import predict_arrays

# Inverse strength of the prior on the slope. Of 1, 2.5, 6.25 and 25 it has the lowest expected loss
# on 10 and on 30 simulated images; from 100 images on they hardly differ.
_C = 2.5
_SLOPES = (0.01, 100)


def fit_calibration(labels: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Return the slope and intercept with which logits fit the labels best.

    Platt, Probabilistic Outputs for Support Vector Machines, 1999. A slope alone (temperature) does
    not undo the shift that class weights cause. Logits are first scaled to unit variance, and the
    slope has a normal prior there (Gelman et al., A Weakly Informative Default Prior Distribution
    for Logistic and Other Regression Models, 2008). Without it, a handful of images that are all
    right would ask for certainty.

    Args:
        labels: int (n,), 0 female and 1 male.
        logits: float (n,) of the label male, of images that were not trained on.

    Returns:
        The slope, from 0.01 to 100, and the intercept; (1, 0) if a label has no image. Logits that
        do not rank the images better than chance get the lowest slope, never a negative one.
    """
    males = int(labels.sum())
    if males in (0, len(labels)):
        return 1.0, 0.0
    scale = float(logits.std()) or 1.0
    model = LogisticRegression(C=_C, tol=1e-8, max_iter=1000)
    model.fit((logits / scale)[:, None], labels)
    fitted = float(model.coef_[0, 0]) / scale
    slope = min(max(fitted, _SLOPES[0]), _SLOPES[1])
    if slope == fitted:
        return slope, float(model.intercept_[0])
    return slope, math.log(males / (len(labels) - males)) - slope * float(logits.mean())


def calibrate(network: Network, validation: ProcessedSplit) -> tuple[float, float]:
    """Return the slope and intercept with which the network fits the validation split best."""
    logits = predict_arrays(network.logits(), validation.batches(32))
    return fit_calibration(validation.labels, logits)
