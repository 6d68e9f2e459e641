"""What DVC and the environment pass to a command: repository, paths, experiment and inputs."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from facegender.errors import UserError
from facegender.files import parse_yaml

# Id of a sweep's run, for the stages of its experiments.
PARENT_RUN = "FACEGENDER_PARENT_RUN"
# Repository of a sweep, for the stages of its experiments, which run in clones.
ROOT = "FACEGENDER_ROOT"
# Seconds within which all workers of a training must connect.
WORKER_WAIT = "FACEGENDER_WORKER_WAIT"
# The stages that make a model.
TRAINED_BY = ("download", "split", "preprocess", "train")


def project_root() -> Path:
    """Return the root of the repository that this command belongs to.

    DVC runs temporary experiments in a copy under `.dvc/tmp` and sets DVC_ROOT to the repository
    itself; a sweep runs them in clones and sets FACEGENDER_ROOT. Outside both the root is the
    nearest parent folder with a `.dvc` directory.

    Raises:
        UserError: no parent folder has one.
    """
    if root := os.environ.get(ROOT) or os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise UserError(
        f"{here} is not in a clone of facegender: no parent folder contains .dvc/. Change to one, "
        "with `cd`."
    )


def read_lock(params: Path) -> str:
    """Return the text of the dvc.lock beside params.yaml; empty without one."""
    lock = params.with_name("dvc.lock")
    return lock.read_text(encoding="utf-8") if lock.is_file() else ""


def pipeline_paths(dvc_yaml: str) -> dict[str, str]:
    """Return the paths of the pipeline's files by their names in the text of dvc.yaml.

    Raises:
        LookupError, TypeError or ruamel.yaml.YAMLError: the text is not this project's dvc.yaml.
    """
    return parse_yaml(dvc_yaml)["vars"][0]["path"]


def tracking_uri() -> str | None:
    """Return the tracking server that MLFLOW_TRACKING_URI names, or None for the local store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def worker_wait() -> float:
    """Return how many seconds worker 0 waits for the others: FACEGENDER_WORKER_WAIT, or 900.

    Raises:
        UserError: FACEGENDER_WORKER_WAIT is not a whole number above 0.
    """
    text = os.environ.get(WORKER_WAIT) or "900"
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{WORKER_WAIT}={text!r} is not a whole number of seconds, such as 900.")
    return int(text)


def run_name_and_tags() -> tuple[str, dict[str, str]]:
    """Return a name for this execution's MLflow run, and tags that identify its experiment.

    DVC passes the experiment's name and baseline commit in the environment of the stages. (MLflow
    itself adds the commit as a tag.)
    """
    experiment = os.environ.get("DVC_EXP_NAME", "")
    tags = {
        "dvc.exp_name": experiment,
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "mlflow.parentRunId": os.environ.get(PARENT_RUN, ""),
    }
    return experiment or "repro", {key: value for key, value in tags.items() if value}


def input_tags(lock: str, stages: Sequence[str]) -> dict[str, str]:
    """Return tags that identify a run's inputs, from the text of dvc.lock; none if it is empty.

    `dvc.data` is the digest of the raw images in dvc.lock. `dvc.lock` is one SHA-256 of the
    commands, inputs and parameters in dvc.lock. It leaves out outputs, because some differ from run
    to run, and stages other than `stages`, because DVC writes an entry when a stage ends.
    """
    if not lock:
        return {}
    entries = parse_yaml(lock)["stages"]
    known = {stage: entries[stage] for stage in stages if stage in entries}
    inputs = {
        stage: {
            "cmd": entry["cmd"],
            "deps": {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])},
            "params": entry.get("params", {}),
        }
        for stage, entry in known.items()
    }
    text = json.dumps(inputs, sort_keys=True)
    tags = {"dvc.lock": hashlib.sha256(text.encode()).hexdigest()}
    for out in known.get("download", {}).get("outs", []):
        if out["md5"].endswith(".dir"):
            tags["dvc.data"] = out["md5"]
    return tags


def check_inputs(lock: Path, inputs: Sequence[Path]) -> None:
    """In a stage that DVC runs, refuse inputs that differ from dvc.lock.

    A stage run by hand accepts any input.

    Raises:
        UserError: an input differs; the message names the files.
    """
    from facegender.runtime import integrity

    if os.environ.get("DVC_STAGE"):
        integrity.check_inputs(lock, inputs)
