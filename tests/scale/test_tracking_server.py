"""A team's tracking server: MLflow with accounts, on PostgreSQL and S3, as deploy/ starts it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow.entities import Run
from mlflow.server import get_app_client

from tests.conftest import free_port
from tests.leaks import holding
from tests.pipeline.conftest import EPOCHS, HOST, SMALL, Clone, answers, copy_of, write_grid
from tests.scale.servers import BUCKET, running, s3_server, stored
from tools.compose_params import ROOT

pytestmark = pytest.mark.scale

NAMES = ("one", "two", "three", "four")
LOGGED = 20  # epochs
# Log as a pipeline does, without running one: parameters, datasets, epochs and files.
PIPELINE = f"""
import sys, time
from pathlib import Path
from facegender.tracking import connection, log, runs
from facegender.runtime.dvc_context import tracking_uri
from facegender.runtime.entry_points import run_command

def main():
    name, root = sys.argv[1], Path.cwd()
    params = {{f"group.parameter_{{number}}": f"{{name}} {{number}}" for number in range(80)}}
    (root / name).write_bytes(name.encode() * 100_000)
    (root / "ready").touch()
    while not (root.parent / "go").exists():
        time.sleep(0.05)
    connection.connect(root, tracking_uri())
    with runs.training_run(
        name=name, params=params, tags={{}}, manifests={{"train": root / "train.csv"}}
    ):
        for epoch in range(1, {LOGGED} + 1):
            log.log_epoch(epoch, {{"loss": 1 / epoch, "val_loss": 2 / epoch}})
        log.log_numbers("test", {{"accuracy": 0.5}})
        log.log_files(root / "train.csv", metrics=[root / name])

run_command(main)
"""


@dataclass(frozen=True)
class Team:
    """The running server, and what its clients need: an address, a name and a password."""

    address: str
    client: dict[str, str]
    secrets: list[str]
    s3: Any

    def runs(self) -> dict[str, Run]:
        """Return the server's runs by name; no name may occur twice."""
        every = mlflow.search_runs(experiment_names=["facegender"], output_format="list")
        named = {run.info.run_name: run for run in every}
        assert len(named) == len(every)
        return named


@contextmanager
def tracking_server(data: Path, log: Path, environment: dict[str, str]) -> Iterator[int]:
    port = free_port()
    command = [str(ROOT / "deploy/tracking-server"), "--data", str(data)]
    command += ["--artifacts", f"s3://{BUCKET}/mlflow", "--port", str(port)]
    with running(command, environment, log, lambda: answers(port)):
        yield port


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("needs PostgreSQL: on Debian, apt-get install postgresql")
    mark = f"canary{uuid4().hex}"
    keys = {"AWS_ACCESS_KEY_ID": f"{mark}id", "AWS_SECRET_ACCESS_KEY": f"{mark}aws"}
    server = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": f"{mark}admin",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": f"{mark}flask",
        "POSTGRES_PASSWORD": f"{mark}postgres",
    }
    log = tmp_path_factory.mktemp("team") / "log"
    # Where PostgreSQL's own user can get to, which pytest's folders are not.
    with s3_server(keys) as (s3_address, s3), tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        environment = Clone(Path(folder)).environment(
            **server, **keys, MLFLOW_S3_ENDPOINT_URL=s3_address, AWS_DEFAULT_REGION="us-east-1"
        )
        with tracking_server(Path(folder) / "data", log, environment) as port:
            address = f"http://{HOST}:{port}"
            client = {
                "MLFLOW_TRACKING_URI": address,
                "MLFLOW_TRACKING_USERNAME": "admin",
                "MLFLOW_TRACKING_PASSWORD": server["MLFLOW_AUTH_ADMIN_PASSWORD"],
            }
            with pytest.MonkeyPatch.context() as patch:
                for name in filter(lambda name: name.startswith("AWS_"), list(os.environ)):
                    patch.delenv(name)
                for name, value in client.items():
                    patch.setenv(name, value)
                mlflow.set_tracking_uri(address)
                yield Team(address, client, [mark], s3)
        # It stopped all that it started, and left passwords in one file alone.
        assert not (Path(folder) / "data/postgres/postmaster.pid").exists()
        assert holding(Path(folder), [mark]) == ["data/secrets.env"]
        assert (Path(folder) / "data/secrets.env").stat().st_mode & 0o777 == 0o600
        assert mark not in log.read_text()


def together(folder: Path, clients: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Run pipelines of several machines at the same time; return what each printed.

    Args:
        folder: where.
        clients: the variables of each, by the name of its run.
    """
    processes = {}
    for name, client in clients.items():
        root = folder / name
        (root / ".dvc").mkdir(parents=True)
        pd.DataFrame({"path": [f"{name}.png"], "label": [0]}).to_csv(
            root / "train.csv", index=False
        )
        processes[name] = subprocess.Popen(
            ["python", "-c", PIPELINE, name],
            cwd=root,
            env=Clone(root).environment(**client),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        while not all((folder / name / "ready").exists() for name in clients):
            assert all(process.poll() is None for process in processes.values())
        (folder / "go").touch()
        printed = {name: process.communicate(timeout=600)[0] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    assert {process.returncode for process in processes.values()} == {0}, printed
    return printed


def test_four_pipelines_at_once_on_a_new_server_log_all_they_have(
    team: Team, tmp_path: Path
) -> None:
    assert team.s3.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 0
    ada = {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": f"{team.secrets[0]}ada"}
    # As docs/scaling-tracking.md has it.
    get_app_client("basic-auth", team.address).create_user("ada", ada["MLFLOW_TRACKING_PASSWORD"])
    users = (team.client, team.client | ada, team.client, team.client | ada)
    printed = together(tmp_path, dict(zip(NAMES, users, strict=True)))
    assert not any("WARNING" in text for text in printed.values()), printed
    runs = team.runs()
    assert set(runs) == set(NAMES)
    client = mlflow.MlflowClient()
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert run.data.params == {f"group.parameter_{n}": f"{name} {n}" for n in range(80)}
        for metric, first in (("loss", 1), ("val_loss", 2)):
            history = client.get_metric_history(run.info.run_id, metric)
            assert [(point.step, point.value) for point in history] == [
                (epoch, pytest.approx(first / epoch)) for epoch in range(1, LOGGED + 1)
            ]
        assert run.data.metrics["test_accuracy"] == 0.5
        assert {item.dataset.name for item in run.inputs.dataset_inputs} == {"train", "test"}
        path = f"metrics/{name}"
        # Through the server: nobody here has a key for the storage.
        copied = mlflow.artifacts.download_artifacts(
            run_id=run.info.run_id, artifact_path=path, dst_path=str(tmp_path / "copies")
        )
        assert Path(copied).read_bytes() == name.encode() * 100_000
        (key,) = [
            key for key in stored(team.s3) if key.endswith(f"{run.info.run_id}/artifacts/{path}")
        ]
        assert key.startswith("mlflow/")


def test_who_may_not_log_in_is_told_so(team: Team, tmp_path: Path) -> None:
    root = tmp_path / "clone"
    (root / ".dvc").mkdir(parents=True)
    wrong = {"MLFLOW_TRACKING_PASSWORD": f"{team.secrets[0]}-wrong"}
    done = Clone(root).run("facegender", "models", check=False, **team.client | wrong)
    assert done.returncode == 1
    assert done.stdout + done.stderr == (
        "error: MLflow refused the login: check MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD.\n"
    )


def test_a_pipeline_that_may_not_log_in_goes_on_and_says_so(team: Team, tmp_path: Path) -> None:
    wrong = {"MLFLOW_TRACKING_PASSWORD": f"{team.secrets[0]}-wrong"}
    runs = set(team.runs())
    said = together(tmp_path, {"stranger": team.client | wrong})["stranger"]
    assert len(said.splitlines()) == 1
    assert "names refused the login (check MLFLOW_TRACKING_USERNAME and" in said
    assert "so this stage logs to mlflow.db" in said
    assert team.secrets[0] not in said
    assert (tmp_path / "stranger/mlflow.db").is_file()
    assert holding(tmp_path, team.secrets) == []
    assert set(team.runs()) == runs


@pytest.fixture(scope="module")
def clone(team: Team, reproduced: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone that has trained, with the server's help, once more."""
    clone = copy_of(reproduced, tmp_path_factory.mktemp("member"))
    clone.run("dvc", "repro", "--force", "--single-item", "train", "evaluate", **team.client)
    clone.commit("trained for the team")
    return clone


def test_the_pipelines_run_is_on_the_server_and_nowhere_else(team: Team, clone: Clone) -> None:
    run = team.runs()["repro"]
    assert run.info.run_id == json.loads((clone.root / "models/run.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    history = pd.read_csv(clone.root / "metrics/history.csv")
    client = mlflow.MlflowClient()
    for metric in ("loss", "val_accuracy"):
        points = client.get_metric_history(run.info.run_id, metric)
        assert [point.value for point in points] == pytest.approx(history[metric].tolist())
    assert run.data.params["train.epochs"] == str(EPOCHS)
    figures = json.loads((clone.root / "metrics/test.json").read_text())
    assert run.data.metrics["test_accuracy"] == figures["accuracy"]
    names = {item.path for item in client.list_artifacts(run.info.run_id, "metrics")}
    assert {"metrics/test.json", "metrics/predictions.csv", "metrics/test"} <= names


def test_a_sweep_nests_its_runs_there(team: Team, clone: Clone) -> None:
    write_grid(clone.root.parent / "grid.yaml", [EPOCHS])
    clone.run("facegender", "sweep", "../grid.yaml", "--name", "sweep", **team.client)
    runs = team.runs()
    assert runs["sweep-1"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert runs["sweep"].data.tags["facegender.best"] == "sweep-1"
    assert runs["sweep-1"].data.tags["facegender.best"] == "true"
    assert {runs[name].info.status for name in ("sweep", "sweep-1")} == {"FINISHED"}


def test_a_run_that_fails_is_failed_with_its_log(team: Team, clone: Clone, tmp_path: Path) -> None:
    failing = copy_of(clone, tmp_path)
    words = [word for item in (*SMALL, "train.epochs=-1") for word in ("-S", item)]
    done = failing.run("dvc", "exp", "run", "--name", "failing", *words, check=False, **team.client)
    assert done.returncode != 0
    failed = team.runs()["failing"]
    assert failed.info.status == "FAILED"
    log = mlflow.artifacts.load_text(f"{failed.info.artifact_uri}/log/train.txt")
    assert "train.epochs" in log
    assert holding(failing.root, team.secrets) == []


def test_the_registry_promotes_and_rolls_back_there(
    team: Team, clone: Clone, tmp_path: Path
) -> None:
    other = copy_of(clone, tmp_path)
    other.compose(*SMALL, "evaluate.min_group_size=7")  # another evaluation of the same model
    other.run("dvc", "repro", "--single-item", "evaluate", **team.client)
    first, second = (
        json.loads((one.root / "models/evaluation_run.json").read_text())["run_id"]
        for one in (clone, other)
    )
    assert first != second
    force = ("--force", "--reason", "small, for a test")
    for run in (first[:12], second):
        done = clone.run("facegender", "promote", run, *force, **team.client)
        assert "is the champion now" in done.stdout
    # Another clone sees the same, and may put the former one back.
    assert champion(other, team) == second
    done = other.run("facegender", "rollback", **team.client)
    assert "version 1 is the champion again" in done.stdout
    assert champion(clone, team) == first
    assert "no model is registered" in clone.run("facegender", "models").stderr
    model = mlflow.artifacts.download_artifacts(
        "models:/facegender@champion", dst_path=str(tmp_path / "model")
    )
    (copied,) = Path(model).rglob("model.tflite")
    assert copied.read_bytes() == (clone.root / "models/model.tflite").read_bytes()


def champion(clone: Clone, team: Team) -> str:
    lines = clone.run("facegender", "models", "--json", **team.client).stdout.splitlines()
    (run,) = [one["run_id"] for one in map(json.loads, lines) if "champion" in one["aliases"]]
    return run


def test_no_credential_is_in_a_clone_an_artifact_or_an_argument(team: Team, clone: Clone) -> None:
    words = [secret.encode() for secret in team.secrets]
    assert holding(clone.root, team.secrets) == []
    every = stored(team.s3)
    assert len(every) > 20
    assert not any(word in content for content in every.values() for word in words)
    arguments = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments[path] = path.read_bytes()
        except OSError:  # it has ended
            continue
    assert any(b"basic-auth" in line for line in arguments.values())
    assert not any(word in line for line in arguments.values() for word in words)
    runs = mlflow.search_runs(experiment_names=["facegender"], output_format="list")
    tags = [tag for run in runs for tag in run.data.tags.values()]
    assert len(tags) > 10
    assert not any(secret in tag for tag in tags for secret in team.secrets)


# Compose: as far as it can be tested without Docker.


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())


def test_compose_has_no_password_and_listens_to_this_machine_alone() -> None:
    services = compose()["services"]
    assert set(services) == {"postgres", "mlflow"}
    for service in services.values():
        name, _, tag = service["image"].rpartition(":")
        assert name
        assert re.match(r"\d+\.\d+", tag)
        assert service["healthcheck"]["test"][0] == "CMD"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for key, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|KEY", key):
                # Compose stops if it is not set: there is no default.
                assert re.fullmatch(r"\$\{" + key + r":\?[^}]+\}", value)
    assert "ports" not in services["postgres"]
    example = (ROOT / "deploy/env.example").read_text()
    needed = set(re.findall(r"\$\{(\w+)", (ROOT / "deploy/compose.yaml").read_text()))
    given = dict(line.split("=") for line in example.splitlines() if not line.startswith("#"))
    assert set(given) == needed
    assert set(given.values()) == {""}
    assert (
        subprocess.run(["git", "check-ignore", "deploy/.env"], cwd=ROOT, check=False).returncode
        == 0
    )


def test_compose_runs_what_the_script_runs() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    script = (ROOT / "deploy/tracking-server").read_text()
    shared = (ROOT / "deploy/mlflow-server").read_text()
    assert 'CMD ["mlflow-server"]' in dockerfile
    assert "COPY mlflow-server " in dockerfile
    assert '"$here/mlflow-server"' in script
    environment = set(compose()["services"]["mlflow"]["environment"])
    needed = set(re.findall(r"^for name in (.*); do", shared.replace("\\\n", ""), re.M)[0].split())
    assert needed <= environment
    initdb = shlex.split(compose()["services"]["postgres"]["environment"]["POSTGRES_INITDB_ARGS"])
    assert set(initdb) <= set(shlex.split(script.replace("\\\n", ""), comments=True))
    lock = (ROOT / "requirements-scale.lock").read_text()
    pinned = re.findall(r"([\w-]+)(?:\[auth\])?==([\d.]+\d)", dockerfile)
    assert [name for name, _ in pinned] == ["mlflow", "psycopg2-binary", "boto3"]
    assert all(f"\n{name}=={version} " in lock for name, version in pinned)
    assert compose()["services"]["mlflow"]["image"].endswith(f":{dict(pinned)['mlflow']}")


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    script = str(ROOT / "deploy/tracking-server")
    here = Clone(tmp_path)
    assert "usage:" in here.run(script, "--help").stdout
    assert here.run(script, check=False).returncode == 2
    assert "needs a value" in here.run(script, "--data", check=False).stderr
    bare = here.run(script, "--data", "d", "--artifacts", "a", check=False, PATH="/usr/bin:/bin")
    assert bare.stderr == "error: there is no mlflow on PATH: source .venv/bin/activate\n"
    elsewhere = tmp_path / "tracking-server"
    elsewhere.write_text(Path(script).read_text().replace("/usr/lib/postgresql", "/none"))
    (tmp_path / "mlflow").symlink_to("/bin/true")
    words = ("bash", str(elsewhere), "--data", "d", "--artifacts", "a")
    bare = here.run(*words, check=False, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert bare.stderr.startswith("error: there is no PostgreSQL here")
