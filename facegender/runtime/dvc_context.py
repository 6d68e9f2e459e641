"""What DVC and the environment tell a command: its repository, paths, experiment and inputs."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from facegender.errors import UserError

# A sweep names its own run in it to the stages of its experiments.
PARENT_RUN = "FACEGENDER_PARENT_RUN"
# Seconds in which all workers of a training must be there.
WORKER_WAIT = "FACEGENDER_WORKER_WAIT"


def project_root() -> Path:
    """Return the root of the repository that this command belongs to.

    DVC runs temporary experiments in a copy below `.dvc/tmp` and names the repository itself in
    DVC_ROOT; outside DVC it is the nearest folder upwards with a `.dvc` directory.

    Raises:
        UserError: there is none.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise UserError(f"{here} is not inside a clone of facegender: no folder above it has .dvc/.")


def pipeline_paths(dvc_yaml: str) -> dict[str, str]:
    """Return the paths of the pipeline's files by the names that the text of dvc.yaml gives them.

    Raises:
        LookupError, TypeError or yaml.YAMLError: the text is another one's.
    """
    import yaml

    return yaml.safe_load(dvc_yaml)["vars"][0]["path"]


def tracking_uri() -> str | None:
    """Return the tracking server that MLFLOW_TRACKING_URI names, or None for the local store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def worker_wait() -> float:
    """Return how long worker 0 waits for the others, in seconds: 900, or what the user says.

    Raises:
        UserError: FACEGENDER_WORKER_WAIT is no number above 0.
    """
    text = os.environ.get(WORKER_WAIT) or "900"
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{WORKER_WAIT}={text!r} is no number of seconds, such as 900.")
    return int(text)


def run_name_and_tags() -> tuple[str, dict[str, str]]:
    """Return a name for this execution's MLflow run, and tags that tie it to its experiment.

    DVC names experiments, and their baseline commit, in the environment of the stages. (The commit
    itself is a tag of MLflow's own.)
    """
    experiment = os.environ.get("DVC_EXP_NAME", "")
    tags = {
        "dvc.exp_name": experiment,
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "mlflow.parentRunId": os.environ.get(PARENT_RUN, ""),
    }
    return experiment or "repro", {key: value for key, value in tags.items() if value}


def input_tags(lock: Path, stages: Sequence[str]) -> dict[str, str]:
    """Return tags for what DVC knows of a run's inputs; none if there is no dvc.lock.

    `dvc.data` is the digest of the raw images, as it stands in dvc.lock. `dvc.lock` is one SHA-256
    of commands, inputs and parameters as dvc.lock has them. Outputs are left out, for some differ
    from run to run; and so are other stages, whose entries change while the pipeline runs.

    Args:
        lock: the file dvc.lock.
        stages: those that have run: DVC writes the entry of a stage when it has ended.
    """
    import yaml  # here, as other imports in this module: a quick command should not wait for them

    if not lock.is_file():
        return {}
    entries = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
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
    """Refuse, in a stage that DVC runs, inputs that are not what dvc.lock records.

    A stage that is run by hand may be given anything.

    Args:
        lock: the file dvc.lock.
        inputs: files and directories.

    Raises:
        UserError: names the files.
    """
    from facegender.runtime import integrity

    if os.environ.get("DVC_STAGE"):
        integrity.check_inputs(lock, inputs)
