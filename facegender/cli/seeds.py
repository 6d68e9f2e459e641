"""`facegender seeds`."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facegender.cli.arguments import setting, whole_number
from facegender.cli.sweep import add_name
from facegender.errors import UserError
from facegender.runtime.dvc_context import pipeline_paths, project_root, tracking_uri

if TYPE_CHECKING:
    from facegender.runtime.sweep import Ended

SEED = "train.seed"
_METRICS = ("accuracy", "f1", "roc_auc", "loss", "ece")
# What `facegender gate` calls its exit codes; any other is "no verdict".
_VERDICTS = {0: "pass", 1: "fail", 3: "not enough evidence"}
_GATE = "from facegender.cli.main import main; main()"


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Train the recipe of conf/ with several seeds, as DVC experiments under one MLflow run. "
        "Print mean and standard deviation of the test metrics, and how often the gate passes. "
        "The interval of a single run does not include the chance of training; this does. Exit "
        "code 1 if an experiment failed."
    )
    parser.add_argument("count", type=whole_number, metavar="N", help="number of seeds")
    parser.add_argument("--first", type=int, default=42, help="first seed (default: 42)")
    parser.add_argument(
        "--set",
        "-S",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter to set in all experiments, as in `dvc exp run -S`",
    )
    parser.add_argument(
        "--jobs", type=whole_number, default=1, help="experiments at the same time (default: 1)"
    )
    add_name(parser, "seeds")
    parser.set_defaults(run=seeds)


def seeds(args: argparse.Namespace) -> int:
    """Run the experiments and print what varies."""
    from facegender.runtime.sweep import run_sweep
    from facegender.tracking import connection

    root, environment = project_root(), dict(os.environ)
    fixed = dict(args.set)
    if SEED in fixed:
        raise UserError(f"{SEED} is what varies: set the first value with --first, not with -S.")
    connection.connect(root, tracking_uri())
    failed = run_sweep(
        root,
        {SEED: range(args.first, args.first + args.count)},
        name=args.name,
        jobs=args.jobs,
        environment=environment,
        fixed=fixed,
        judge=(sys.executable, "-c", _GATE, "gate", "--format", "json", "--baseline", "{baseline}"),
        summarize=lambda ended: _summarize(root, ended, set(fixed)),
    )
    return int(failed > 0)


def _summarize(root: Path, ended: Sequence["Ended"], fixed: set[str]) -> dict[str, float]:
    """Print the spread of the test metrics and of the gate's verdict; return it as metrics."""
    from facegender.runtime.git import committed_text
    from facegender.runtime.sweep import different_params

    commits = [one.commit for one in ended if one.commit is not None]
    paths = pipeline_paths(committed_text(root, "dvc.yaml", commits[0]))
    results = [
        json.loads(committed_text(root, paths["test_metrics"], commit)) for commit in commits
    ]
    here = (root / "params.yaml").read_text(encoding="utf-8")
    different = different_params([here, committed_text(root, "params.yaml", commits[0])])
    if unexpected := sorted(different - fixed - {SEED}):
        print(
            f"not the parameters of params.yaml: {', '.join(unexpected)}. Experiments start from "
            "conf/; set others with -S."
        )
    judged = [one for one in ended if one.judged is not None]
    verdicts = Counter(_VERDICTS.get(one.judged or 0, "no verdict") for one in judged)
    spread = spread_of(results)
    print(f"{len(results)} seeds, test split of {results[0]['n']} images:")
    print(f"{'':<10}{'mean':>8}{'sd':>8}{'least':>8}{'most':>8}")
    for metric, numbers in spread.items():
        print(f"{metric:<10}" + "".join(f"{number:>8.4f}" for number in numbers.values()))
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    print(f"gate, against the commit that the seeds start from: {told}")
    for one in judged:
        if one.judged not in _VERDICTS:
            print(f"no verdict on {one.point.name}: {why_undecided(one.judgement)}")
    logged = {
        f"test_{metric}_{kind}": number
        for metric, numbers in spread.items()
        for kind, number in numbers.items()
    }
    return logged | {f"gate_{key.replace(' ', '_')}": count for key, count in verdicts.items()}


def spread_of(results: Sequence[Mapping[str, Any]]) -> dict[Any, dict[str, float]]:
    """Return mean, standard deviation (n - 1), least and most of each test metric.

    Args:
        results: metrics of each run; a metric that one of them lacks is left out. The standard
            deviation of a single run is NaN.
    """
    import pandas as pd

    table = pd.DataFrame([{name: result.get(name) for name in _METRICS} for result in results])
    spread = table.dropna(axis="columns").agg(["mean", "std", "min", "max"])
    return spread.set_axis(["mean", "sd", "least", "most"]).to_dict()


def why_undecided(judgement: str) -> str:
    """Return why the gate has no verdict, from its JSON, or its error if it printed none."""
    try:
        return "; ".join(json.loads(judgement)["undecided"])
    except ValueError:
        return (judgement.strip().splitlines() or ["the gate printed nothing"])[-1]
