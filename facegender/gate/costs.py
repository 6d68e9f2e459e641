"""The cost of a model compared with the baseline's: size, latency and training."""

import math
from collections.abc import Mapping

from facegender.gate.verdict import CostRatio, Verdict
from facegender.params import Gate


def compare_costs(
    candidate: Mapping[str, float], baseline: Mapping[str, float], settings: Gate
) -> list[CostRatio]:
    """Return the ratio of each cost; beyond its tolerance the verdict is `warn`."""
    rows = []
    for name in dict.fromkeys([*baseline, *candidate]):
        old, new = (finite(costs.get(name)) for costs in (baseline, candidate))
        ratio = new / old if old and new is not None else None
        if name.endswith("_per_second"):
            limit = settings.cost.min_speed_ratio
            beyond = ratio is not None and ratio < limit
        else:
            size = name.startswith("size_")
            limit = settings.cost.max_size_ratio if size else settings.cost.max_time_ratio
            beyond = ratio is not None and ratio > limit
        verdict: Verdict = "info" if ratio is None else "warn" if beyond else "pass"
        rows.append(CostRatio(name, old, new, ratio, limit, verdict))
    return rows


def finite(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]
