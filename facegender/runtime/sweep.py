"""Sweeps: a grid of parameters, each point a DVC experiment, all under one MLflow run.

The experiments are `dvc exp run --temp`, not DVC's queue. Its workers keep the environment of the
process that started them, so they cannot receive the sweep's run, and `dvc exp run --run-all` hangs
when a worker dies (docs/experiments.md).
"""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from facegender.errors import UserError
from facegender.runtime.dvc_context import PARENT_RUN, pipeline_paths
from facegender.runtime.redaction import secrets_of, without_credentials
from facegender.tracking import log, runs

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep: its name and the parameters that it sets."""

    name: str
    values: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The parameters as `dvc exp run -S` takes them."""
        return [f"{key}={_word(value)}" for key, value in self.values.items()]


def read_grid(path: Path) -> dict[str, list[Any]]:
    """Read a YAML file with a list of values for each parameter; a single value counts as a list.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read the grid {path}: {error}") from error
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


def grid_points(grid: Mapping[str, Sequence[Any]], name: str) -> list[Point]:
    """Return every combination of a grid's values, the last parameter changing fastest."""
    combinations = itertools.product(*grid.values())
    return [
        Point(f"{name}-{number}", dict(zip(grid, values, strict=True)))
        for number, values in enumerate(combinations, start=1)
    ]


def run_sweep(
    root: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    name: str,
    jobs: int,
    environment: Mapping[str, str],
) -> int:
    """Run a grid's experiments, print each one's result, and mark the best.

    The best has the lowest validation loss at the epoch that it kept; the test split is not used.
    The sweep continues after a failed experiment. Call `connection.connect` first.

    Args:
        root: the repository.
        grid: values of each parameter.
        name: name of the sweep; its experiments add their number.
        jobs: number of experiments at the same time.
        environment: variables for the experiments, copied before connecting, because MLflow then
            sets some of its own.

    Returns:
        The number of failed experiments.
    """
    points = grid_points(grid, name)
    varied = [key for key, values in grid.items() if len(values) > 1]
    print(f"{name}: {len(points)} experiments", flush=True)
    best: tuple[float, Point, str] | None = None
    failed = 0
    with runs.sweep_run(name, grid) as parent:
        handed_down = {
            **environment,
            PARENT_RUN: parent,
            # Stages run `python`, which must be this interpreter.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
        }
        with closing(_run_all(root, points, jobs, handed_down)) as ended:
            for point, code, printed in ended:
                output = without_credentials(printed, secrets_of(environment))
                run_id = _run_of(root, point, parent, code, output)
                what = ", ".join(f"{key}={point.values[key]}" for key in varied)
                loss = None if code else runs.validation_loss(run_id)
                if code:
                    failed += 1
                    end = f"FAILED: {_reason(output)}"
                elif loss is None:
                    end = "no validation loss"
                else:
                    end = f"validation loss {loss:.4f}"
                    if best is None or loss < best[0]:
                        best = loss, point, run_id
                print(f"{point.name}  {what}  {end}", flush=True)
        if best is not None:
            runs.mark_best(best[2], best[1].name, best[0])
    if best is not None:
        print(f"best: {best[1].name}; `dvc exp apply {best[1].name}` applies it here")
    return failed


def _run_all(
    root: Path, points: Sequence[Point], jobs: int, environment: Mapping[str, str]
) -> Generator[tuple[Point, int, str], None, None]:
    """Yield each experiment when it ends, with its exit code and output."""
    # Background jobs of a shell ignore SIGINT, and experiments that inherit this cannot be stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    waiting, running = list(points), dict[subprocess.Popen, tuple[Point, Path]]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    point = waiting.pop(0)
                    log = Path(folder) / point.name
                    process = _start(root, point, log, environment)
                    running[process] = point, log
                    # DVC sets up experiments through one stash: of two that start at once, one may
                    # take the other's.
                    while process.poll() is None and not _is_set_up(log):
                        time.sleep(_POLL_SECONDS)
                time.sleep(_POLL_SECONDS)
                for process in [one for one in running if one.poll() is not None]:
                    point, log = running.pop(process)
                    yield point, process.returncode, log.read_text(errors="replace")
        finally:
            # Like Ctrl-C: the stage ends, and DVC cleans up.
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
            for process in running:
                process.wait()


def _start(root: Path, point: Point, log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    overrides = (word for override in point.overrides for word in ("-S", override))
    # DVC locks the repository while it sets up an experiment; others give up after 3 s.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", "--temp"]
    command += ["--name", point.name, *overrides]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _is_set_up(log: Path) -> bool:
    """Return whether DVC has reached the stages of an experiment."""
    return re.search(r"\bstage\b", log.read_text(errors="replace"), re.IGNORECASE) is not None


def _run_of(root: Path, point: Point, parent: str, code: int, output: str) -> str:
    """Return the id of an experiment's MLflow run; log one if its stages did not.

    Stages log nothing if DVC cannot start them or already has their results.
    """
    run_id = runs.find_child(parent, point.name)
    if run_id is not None:
        return run_id
    tags = {"dvc.exp_name": point.name, "mlflow.parentRunId": parent}
    if code:
        return runs.failed_run(
            output,
            stage="dvc",
            name=point.name,
            params=point.values,
            tags=tags,
        )
    return _log_restored(root, point, tags)


def _log_restored(root: Path, point: Point, tags: Mapping[str, str]) -> str:
    import dvc.api
    import pandas as pd

    from facegender.params import Params, flatten

    paths = pipeline_paths((root / "dvc.yaml").read_text())

    def read(path: str) -> str:
        return dvc.api.read(path, repo=str(root), rev=point.name)

    with runs.training_run(
        name=point.name,
        params=flatten(Params.model_validate(yaml.safe_load(read("params.yaml")))),
        tags={**tags, "dvc.restored": "true"},
        manifests={},
    ) as run:
        log.log_history(pd.read_csv(io.StringIO(read(paths["history"]))))
        for prefix in ("test", "export"):
            log.log_numbers(prefix, json.loads(read(paths[f"{prefix}_metrics"])))
    return run.info.run_id


def _word(value: Any) -> str:
    """Return a value in the syntax of Hydra's overrides."""
    if isinstance(value, str) and re.fullmatch(r"[\w./:-]+", value):
        return value
    return json.dumps(value)


def _reason(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.lower().startswith("error")]
    return (said or lines[-1:] or ["it printed nothing"])[0]
