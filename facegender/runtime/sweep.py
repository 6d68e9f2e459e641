"""Sweeps: a grid of parameters, each point a DVC experiment, all under one MLflow run.

Each experiment is a `dvc exp run` in a clone of its own (`experiment_clone`), not one of DVC's
queue. Its workers keep the environment of the process that started them, so they cannot receive the
sweep's run, and `dvc exp run --run-all` hangs when a worker dies (docs/experiments.md).
"""

import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from requests import RequestException
from ruamel.yaml import YAMLError

from facegender.errors import UserError, reason_of
from facegender.files import parse_yaml
from facegender.runtime.dvc_context import PARENT_RUN, ROOT, TRAINED_BY, input_tags, pipeline_paths
from facegender.runtime.experiment_clone import (
    Snapshot,
    experiments,
    fetch_experiment,
    make_clone,
    take_snapshot,
)
from facegender.runtime.git import checked_git, committed_text
from facegender.runtime.redaction import secrets_of, without_credentials
from facegender.tracking import log, runs
from facegender.tracking.connection import short_error

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
# Parameters that decide which images are validated on, or how their loss is computed.
_DECIDE_LOSS = ("dataset", "data", "split", "train.label_smoothing")
# These too if a face check drops the images that it finds.
_DECIDE_FACES = ("image.face", "image.crop")
# Folders whose files an experiment reads.
_NEEDED = ("conf", "facegender", "stages")
# DVC takes a stage as unchanged only if its outputs are there; a cache may lack some. DVC turns
# Ctrl-C into code 252.
_RUN = """
import sys
from dvc.cli import main
interrupted = main(["checkout", "--quiet", "--allow-missing"]) == 252
sys.exit(252 if interrupted else main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep: its name and the parameters that it sets.

    Attributes:
        overrides: the parameters as `dvc exp run -S` takes them.
    """

    name: str
    values: Mapping[str, Any]
    overrides: Sequence[str] = ()


def read_grid(path: Path) -> dict[str, list[Any]]:
    """Read a grid: YAML with one value, or a list, per parameter. Raises UserError otherwise."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(
            f"Cannot read the grid {path}: {reason_of(error)}. Name a YAML file like "
            "conf/sweep.yaml."
        ) from error
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{path} is not a grid: it must have one parameter with its values per line, such as "
            "`train.learning_rate: [0.001, 0.003]`."
        )
    grid = {}
    for key, values in content.items():
        listed = values if isinstance(values, list) else [values]
        if not listed or any(isinstance(value, list | dict) for value in listed):
            raise UserError(
                f"{path}: {key} must be a value or a list of values; a parameter within a group "
                "has its dotted name, such as `train.learning_rate`."
            )
        grid[str(key)] = listed
    return grid


def grid_points(
    grid: Mapping[str, Sequence[Any]], name: str, fixed: Mapping[str, str] | None = None
) -> list[Point]:
    """Return every combination of a grid's values, the last parameter changing fastest.

    Args:
        fixed: parameters of all points, as `dvc exp run -S` takes them.
    """
    fixed = fixed or {}
    points = []
    for number, combination in enumerate(itertools.product(*grid.values()), start=1):
        values = dict(zip(grid, combination, strict=True))
        words = {**fixed, **{key: _word(value) for key, value in values.items()}}
        overrides = [f"{key}={word}" for key, word in words.items()]
        points.append(Point(f"{name}-{number}", {**fixed, **values}, overrides))
    return points


@dataclass(frozen=True)
class Ended:
    """An experiment that has ended.

    Attributes:
        code: exit code of DVC.
        output: text that DVC and the stages printed.
        commit: the experiment's commit, or None if it failed.
        judged: exit code of the command that judged it, or None.
        judgement: text that this command printed, or what it reported as an error.
    """

    point: Point
    code: int
    output: str
    commit: str | None
    judged: int | None
    judgement: str = ""


def run_sweep(
    root: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    name: str,
    jobs: int,
    environment: Mapping[str, str],
    fixed: Mapping[str, str] | None = None,
    judge: Sequence[str] = (),
    summarize: Callable[[Sequence[Ended]], Mapping[str, float]] | None = None,
) -> int:
    """Run a grid's experiments, print each one's result, and mark the best.

    The best has the lowest validation loss at the epoch that it kept; the test split is not used.
    No experiment is the best if the losses cannot be compared. The sweep continues after a failed
    experiment. Call `connection.connect` first.

    Args:
        name: name of the sweep; its experiments add their number.
        jobs: number of experiments at the same time.
        environment: variables for the experiments, copied before connecting, because MLflow then
            sets some of its own.
        fixed: parameters of all experiments, as `dvc exp run -S` takes them.
        judge: command to run in the clone of each experiment that succeeds, or nothing.
            `{baseline}` in it is the commit from which the sweep starts.
        summarize: called with all experiments at the end, if any succeeded; returns metrics for the
            sweep's run.

    Returns:
        The number of failed experiments.

    Raises:
        UserError: the repository already has an experiment of one of the names.
    """
    points = grid_points(grid, name, fixed)
    if taken := sorted({point.name for point in points} & experiments(root)):
        raise UserError(
            f"The repository already has the experiment {taken[0]}. Choose another --name, or "
            f"remove it with `dvc exp remove {taken[0]}`."
        )
    if untracked := checked_git(root, "ls-files", "--others", "--exclude-standard", *_NEEDED):
        print(
            "not in the experiments, because git does not track them: "
            f"{', '.join(untracked.splitlines())}. `git add` them first."
        )
    varied = [key for key, values in grid.items() if len(values) > 1]
    print(f"{name}: {len(points)} experiments", flush=True)
    best: tuple[float, Point, str] | None = None
    all_ended = []
    same = {key: [value] for key, value in (fixed or {}).items()}
    with runs.sweep_run(name, {**same, **grid}) as parent:
        handed_down = {
            **environment,
            PARENT_RUN: parent,
            # Stages run `python`, which must be this interpreter.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
        }
        with closing(run_points(root, points, jobs, handed_down, judge)) as ends:
            for ended in ends:
                all_ended.append(ended)
                point = ended.point
                output = without_credentials(ended.output, secrets_of(environment))
                loss, run_id = _loss_in_mlflow(root, ended, parent, output)
                what = ", ".join(f"{key}={point.values[key]}" for key in varied)
                if ended.commit is None:
                    end = f"FAILED: {_reason(output)}"
                elif loss is None or run_id is None:
                    end = "no validation loss in MLflow, so it is not compared"
                else:
                    end = f"validation loss {loss:.4f}"
                    if best is None or loss < best[0]:
                        best = loss, point, run_id
                print(f"{point.name}  {what}  {end}", flush=True)
        differing = different_losses(root, [one.commit for one in all_ended if one.commit])
        if best is not None and differing:
            print(
                f"no best: the experiments differ in {', '.join(differing)}, so their validation "
                "losses cannot be compared (docs/experiments.md)"
            )
            best = None
        if best is not None:
            runs.mark_best(best[2], best[1].name, best[0])
        if summarize is not None and any(ended.commit for ended in all_ended):
            runs.log_summary(summarize(all_ended))
    if best is not None:
        print(f"best: {best[1].name}; `dvc exp apply {best[1].name}` applies it here")
    return sum(ended.commit is None for ended in all_ended)


def different_losses(root: Path, commits: Sequence[str]) -> list[str]:
    """Return the parameters that differ between experiments and make their losses incomparable.

    The grid does not show those that a recipe sets.
    """
    from facegender.params import FACE_CHECKS

    texts = [committed_text(root, "params.yaml", commit) for commit in commits]
    different = different_params(texts)
    checks = parse_yaml(texts[0])["data"]["checks"] if texts else {}
    faces = _DECIDE_FACES if any(checks.get(name) == "drop" for name in FACE_CHECKS) else ()
    return [
        name
        for name in (*_DECIDE_LOSS, *faces)
        if any(f"{key}.".startswith(f"{name}.") for key in different)
    ]


def different_params(texts: Sequence[str]) -> set[str]:
    """Return the dotted names of the parameters that differ between contents of params.yaml."""
    from dvc.utils.flatten import flatten

    contents = [flatten(parse_yaml(text)) for text in texts]
    return {
        key
        for key in set().union(*contents)
        if any(content.get(key) != contents[0].get(key) for content in contents)
    }


def _loss_in_mlflow(
    root: Path, ended: Ended, parent: str, output: str
) -> tuple[float | None, str | None]:
    """Return an experiment's validation loss and the id of its run, or None for what is missing.

    If the server fails, the experiment is not compared; DVC has its results.
    """
    try:
        run_id = _run_of(root, ended, parent, output)
        return (None if ended.commit is None else runs.validation_loss(run_id)), run_id
    except (MlflowException, RequestException) as error:
        _log.warning(
            "MLflow failed (%s), so %s is not in the comparison. Its results are in DVC: "
            "`dvc exp show`.",
            short_error(error),
            ended.point.name,
        )
        return None, None


def run_points(
    root: Path,
    points: Sequence[Point],
    jobs: int,
    environment: Mapping[str, str],
    judge: Sequence[str] = (),
) -> Generator[Ended, None, None]:
    """Run experiments, each in a clone, and yield each when it has ended and was fetched.

    Arguments are those of `run_sweep`.
    """
    # Background jobs of a shell ignore SIGINT, and experiments that inherit this cannot be stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    temporary = root / ".dvc" / "tmp"
    temporary.mkdir(exist_ok=True)
    waiting, running = list(points), dict[subprocess.Popen, tuple[Point, Path]]()
    # On the disk of DVC's cache, so that DVC can link files.
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=temporary) as folder:
        snapshot = take_snapshot(root)
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    point = waiting.pop(0)
                    workspace = Path(folder) / point.name
                    running[_start(snapshot, point, workspace, environment)] = point, workspace
                time.sleep(_POLL_SECONDS)
                for process in [one for one in running if one.poll() is not None]:
                    point, workspace = running.pop(process)
                    yield _end(snapshot, point, workspace, process.returncode, environment, judge)
                    shutil.rmtree(workspace)
        finally:
            # Like Ctrl-C: the stage ends, and DVC cleans up.
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
            for process in running:
                process.wait()


def _start(
    snapshot: Snapshot, point: Point, workspace: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    workspace.mkdir()
    make_clone(snapshot, workspace / "clone")
    overrides = (word for override in point.overrides for word in ("-S", override))
    with (workspace / "log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", _RUN, "exp", "run", "--name", point.name, *overrides],
            cwd=workspace / "clone",
            env={
                **environment,
                ROOT: str(snapshot.root),
                # What DVC stores outside a repository; deleted with the clone.
                "DVC_SITE_CACHE_DIR": str(workspace / "dvc"),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(
    snapshot: Snapshot,
    point: Point,
    workspace: Path,
    code: int,
    environment: Mapping[str, str],
    judge: Sequence[str],
) -> Ended:
    clone, output = workspace / "clone", (workspace / "log").read_text(errors="replace")
    commit = None
    try:
        commit = None if code else fetch_experiment(snapshot.root, clone, point.name)
    except UserError as error:  # for example, there is now another of this name
        output += f"\nerror: {error}\n"
    judged, judgement = None, ""
    if commit is not None and judge:
        done = subprocess.run(
            [word.format(baseline=snapshot.head) for word in judge],
            cwd=clone,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        judged, judgement = done.returncode, done.stdout or done.stderr
    return Ended(point, code, output, commit, judged, judgement)


def _run_of(root: Path, ended: Ended, parent: str, output: str) -> str:
    """Return the id of an experiment's MLflow run; log one if its stages did not.

    Stages log nothing if DVC cannot start them or already has their results.
    """
    point = ended.point
    run_id = runs.find_child(parent, point.name)
    if run_id is not None:
        return run_id
    tags = {"dvc.exp_name": point.name, "mlflow.parentRunId": parent}
    if ended.commit is None:
        return runs.failed_run(output, stage="dvc", name=point.name, params=point.values, tags=tags)
    return _log_restored(root, point, ended.commit, tags)


def _log_restored(root: Path, point: Point, commit: str, tags: Mapping[str, str]) -> str:
    import pandas as pd

    from facegender.params import Params, flatten

    def read(path: str) -> io.StringIO:
        return io.StringIO(committed_text(root, path, commit))

    paths = pipeline_paths(read("dvc.yaml").getvalue())
    params = Params.model_validate(parse_yaml(read("params.yaml").getvalue()))
    history = pd.read_csv(read(paths["history"]))
    with runs.training_run(
        name=point.name,
        # MLflow adds a logged model's settings to the parameters of its run.
        params={**flatten(params), "threshold": params.evaluate.threshold},
        tags={
            **tags,
            **input_tags(read("dvc.lock").getvalue(), TRAINED_BY),
            runs.RESTORED: "true",
        },
        manifests={},
    ) as run:
        log.log_history(history)
        log.log_results(
            json.load(read(paths["test_metrics"])),
            robustness=pd.read_csv(read(paths["robustness"])),
            export=json.load(read(paths["export_metrics"])),
            history=history,
        )
    return run.info.run_id


def _word(value: Any) -> str:
    """Return a value in the syntax of Hydra's overrides."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str) and not re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return QuotedString(value, Quote.double).with_quotes()
    return "null" if value is None else str(value)


def _reason(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.lower().startswith("error")]
    return (said or lines[-1:] or ["it printed nothing"])[0]
