"""MLflow's pages: the addresses that show the runs, and a view with the columns that matter."""

import json
from urllib.parse import quote

import mlflow
from mlflow import MlflowClient

from facegender.tracking.connection import EXPERIMENT

_VIEW = "results"
# Widths in pixels: all fit a window of 1280, next to the assistant that MLflow opens at first.
_COLUMNS = {"metrics.`test_accuracy`": 125, "metrics.`test_f1`": 90, "metrics.`test_ece`": 95}
_WIDTHS = {"attributes.`Run Name`": 150, **_COLUMNS}
_COMPARED = 3
# Without it, a first visit shows the menu for GenAI.
_QUERY = "workflowType=machine_learning"


def share_view() -> None:
    """Save a view of the runs, with columns for the test metrics, as a tag of the experiment.

    It is what the page's *Share* button saves. MLflow has no other way to choose columns.
    """
    columns = list(_COLUMNS)
    first = ["checkbox", "attributes.`Run Name`"]
    view = {"selectedColumns": columns, "columnOrder": first + columns, "columnWidths": _WIDTHS}
    MlflowClient().set_experiment_tag(
        _experiment_id(), f"mlflow.sharedViewState.{_VIEW}", json.dumps(view)
    )


def runs_page(server: str, *, shared: bool) -> str:
    """Return the address of the list of runs; `shared`: with the view that `share_view` saved."""
    view = f"&viewStateShareKey={_VIEW}" if shared else ""
    return f"{server}/#/experiments/{_experiment_id()}/runs?{_QUERY}{view}"


def compare_page(server: str) -> str | None:
    """Return the address that compares the last evaluated runs, or None if there is only one."""
    experiment = _experiment_id()
    runs = MlflowClient().search_runs(
        [experiment],
        filter_string="metrics.test_accuracy >= 0",
        max_results=_COMPARED,
        order_by=["attributes.start_time DESC"],
    )
    if len(runs) < 2:
        return None
    compared = {"runs": [run.info.run_id for run in runs], "experiments": [experiment]}
    lists = "&".join(f"{key}={quote(json.dumps(ids))}" for key, ids in compared.items())
    return f"{server}/#/compare-runs?{lists}&{_QUERY}"


def _experiment_id() -> str:
    return mlflow.set_experiment(EXPERIMENT).experiment_id
