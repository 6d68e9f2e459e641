"""Calibration: probabilities that say how often they are right."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit

from facegender.data.processed import ProcessedSplit
from facegender.model.network import Network
from facegender.model.saved_model import predict_arrays


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the temperature that makes logits fit the labels best, by their log likelihood.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. Targets are drawn in from 0
    and 1 as in Platt, Probabilistic Outputs for Support Vector Machines, 1999, section 2.2, so
    that a handful of images that are all right does not ask for certainty.

    Args:
        labels: int (n,), 0 female and 1 male.
        logits: float (n,) of the label male, of images that were not trained on.

    Returns:
        What to divide logits by, from 0.05 to 20; 1.0 if there is no image.
    """
    if len(labels) == 0:
        return 1.0
    males = int(labels.sum())
    targets = np.where(labels == 1, (males + 1) / (males + 2), 1 / (len(labels) - males + 2))

    def loss(log_temperature: float) -> float:
        cooled = logits / np.exp(log_temperature)
        return -float(np.mean(targets * log_expit(cooled) + (1 - targets) * log_expit(-cooled)))

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def calibrate(network: Network, validation: ProcessedSplit) -> float:
    """Return the temperature at which the network's answers on the validation split fit best."""
    logits = predict_arrays(network.logits(), validation.batches(32))
    return fit_temperature(validation.labels, logits)
