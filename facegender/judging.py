"""Whether a run may become the champion: a stand-in until the gate judges it.

It has two floors, and refuses a model that is significantly less accurate than the champion on the
same images.
"""

import json
from pathlib import Path

import pandas as pd
from scipy.stats import binomtest

from facegender.registry import Verdict

MIN_ACCURACY = 0.5
MIN_RECALL = 0.1
SIGNIFICANCE = 0.05


def judge(candidate: Path, champion: Path | None) -> Verdict:
    """Judge a run's results, by the floors and, if there is one, beside the champion's.

    Args:
        candidate: folder with `test.json` and `predictions.csv`, as the pipeline leaves them.
        champion: the same of the present champion, or None.
    """
    metrics = json.loads((candidate / "test.json").read_text())
    floors = {
        "accuracy": MIN_ACCURACY,
        "recall_female": MIN_RECALL,
        "recall_male": MIN_RECALL,
    }
    faults = [
        f"{name} is {metrics.get(name)}, and at least {floor} is wanted"
        for name, floor in floors.items()
        # Written this way round, NaN fails too.
        if not (isinstance(metrics.get(name), float) and metrics[name] >= floor)
    ]
    lines = [f"- {name}: {metrics.get(name)}" for name in floors]
    if champion is not None:
        new, old = (
            pd.read_csv(folder / "predictions.csv").set_index(["path", "sha256"])
            for folder in (candidate, champion)
        )
        if not new["label"].sort_index().equals(old["label"].sort_index()):
            faults.append("the champion was tested on other images or labels")
        else:
            right, before = (
                (table["label"] == table["predicted"]).sort_index() for table in (new, old)
            )
            lost, won = int((before & ~right).sum()), int((~before & right).sum())
            lines.append(f"- beside the champion: {won} images won, {lost} lost")
            if lost > won and binomtest(lost, lost + won).pvalue < SIGNIFICANCE:
                faults.append(f"it loses {lost} images that the champion had, and wins {won}")
    head = "**Failed.** " + "; ".join(faults) if faults else "**Passed.**"
    return Verdict(not faults, "\n".join([head, "", *lines]))
