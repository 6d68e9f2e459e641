"""Calibration: make a probability the share of images that are labelled right."""

import numpy as np
from scipy.optimize import minimize

from facegender.data.processed import ProcessedSplit
from facegender.model.network import Network
from facegender.model.saved_model import predict_arrays

# Standard deviations of the normal priors on the slope's logarithm and on the intercept
# (`python -m bench.calibration` compares them).
_LOG_SLOPE_SD = 0.5
_INTERCEPT_SD = 1.0


def fit_calibration(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    log_slope_sd: float = _LOG_SLOPE_SD,
    intercept_sd: float = _INTERCEPT_SD,
) -> tuple[float, float]:
    """Return the slope and intercept with which logits fit the labels best.

    Platt, Probabilistic Outputs for Support Vector Machines, 1999. Priors around the original
    logits replace his targets: a handful of images that are all right should make the network
    neither certain nor doubtful.

    Args:
        labels: int (n,), 0 female and 1 male.
        logits: float (n,) of the label male, for images that were not trained on.
        log_slope_sd: standard deviation of the prior on the logarithm of the slope, around 0.
        intercept_sd: standard deviation of the prior on the intercept, around 0.

    Returns:
        The slope, always positive, and the intercept; (1, 0) if a label has no image.
    """
    males = int(labels.sum())
    if males in (0, len(labels)):
        return 1.0, 0.0
    logits = logits.astype(np.float64)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        log_slope, intercept = point
        scaled = np.exp(log_slope) * logits
        male = scaled + intercept
        error = np.exp(-np.logaddexp(0, -male)) - labels
        value = (np.logaddexp(0, male) - labels * male).sum() + (
            (log_slope / log_slope_sd) ** 2 + (intercept / intercept_sd) ** 2
        ) / 2
        slopes = (
            error @ scaled + log_slope / log_slope_sd**2,
            error.sum() + intercept / intercept_sd**2,
        )
        return float(value), np.array(slopes)

    log_slope, intercept = minimize(
        loss, np.zeros(2), jac=True, method="L-BFGS-B", options={"ftol": 1e-12}
    ).x
    return float(np.exp(log_slope)), float(intercept)


def calibrate(network: Network, validation: ProcessedSplit) -> tuple[float, float]:
    """Return the slope and intercept with which the network fits the validation split best."""
    logits = predict_arrays(network.logits(), validation.batches(32))
    return fit_calibration(validation.labels, logits)
