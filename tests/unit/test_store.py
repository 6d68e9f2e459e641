"""The local MLflow store: moved, shared by many processes, and left by one that was killed."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from facegender.cli.main import _run
from facegender.errors import UserError
from facegender.runtime.git import checked_git
from facegender.tracking import connection, log, runs
from facegender.tracking.local_store import relocate
from facegender.tracking.registry import find_run
from tests.conftest import init_repository

# Runs in a process of its own, as each experiment does.
LOG_HARD = """
import sys
from pathlib import Path
from facegender.tracking import connection, log, runs
root, name, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
connection.connect(root)
with runs.training_run(
    name=name, params={f"p{n}": n for n in range(50)}, tags={}, manifests={}
):
    for epoch in range(1, epochs + 1):
        log.log_epoch(epoch, {metric: epoch for metric in ("loss", "accuracy", "val_loss")})
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run, an artifact, a registered model and a trace. Tests use copies."""
    root = tmp_path_factory.mktemp("store") / "clone with a space, and ü"
    (root / ".dvc").mkdir(parents=True)
    connection.connect(root)
    with runs.training_run(name="first", params={"p": 1}, tags={}, manifests={}):
        mlflow.log_text("kept", "note.txt")
        model = mlflow.pyfunc.log_model(name="model", python_model=_echo, input_example=["a"])
        mlflow.register_model(model.model_uri, "facegender")
    with mlflow.start_span("span"):
        pass
    mlflow.flush_trace_async_logging()
    return root


def environment() -> dict[str, str]:
    """Return the variables for a process, without the store to which this one is connected."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}


def _echo(model_input: list[str]) -> list[str]:
    return model_input


def moved(filled: Path, to: Path) -> Path:
    """Return a copy of the store at another place, with an artifact that tells it apart."""
    shutil.copytree(filled, to)
    (note,) = to.rglob("note.txt")
    note.write_text("moved")
    return to


def note() -> str:
    """Return the artifact of the first run in the store that is connected."""
    return mlflow.artifacts.load_text(f"{find_run('first').info.artifact_uri}/note.txt")


def places(database: Path, text: str) -> set[tuple[str, str]]:
    """Return every table and column of a database in which a text stands."""
    found = set()
    with closing(sqlite3.connect(database)) as opened:
        tables = opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for row in opened.execute(f'PRAGMA table_info("{table}")').fetchall():
                query = f'SELECT COUNT(*) FROM "{table}" WHERE instr("{row[1]}", ?)'
                if opened.execute(query, (text,)).fetchone()[0]:
                    found.add((table, row[1]))
    return found


def test_a_moved_store_finds_all_its_artifacts(filled: Path, tmp_path: Path) -> None:
    root = moved(filled, tmp_path / "elsewhere, 100 % né")
    former = {filled.as_uri(), str(filled)}
    assert connection.connect(root) > 0
    assert note() == "moved"
    assert mlflow.pyfunc.load_model("models:/facegender/1").predict(["a"]) == ["a"]
    # Where a run's program was is not an address; everything else would be one forgotten.
    left = set().union(*(places(root / "mlflow.db", address) for address in former))
    assert left <= {("tags", "value"), ("logged_model_tags", "tag_value")}
    with closing(sqlite3.connect(root / "mlflow.db")) as opened:
        keys = opened.execute("SELECT key FROM tags WHERE instr(value, ?)", (str(filled),))
        assert {key for (key,) in keys} <= {"mlflow.source.name"}
    assert connection.connect(root) == 0


def test_relocate_repairs_the_repositorys_own_store_whichever_is_set(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = moved(filled, tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert _run(["relocate"]) == 0
    assert "paths rewritten" in capsys.readouterr().out
    assert note() == "moved"


def test_a_copy_logs_to_itself(filled: Path, tmp_path: Path) -> None:
    root = moved(filled, tmp_path / "copy")
    before = sorted(filled.rglob("*"))
    connection.connect(root)
    with runs.training_run(name="second", params={}, tags={}, manifests={}) as run:
        mlflow.log_text("new", "note.txt")
    assert (root / "mlruns/facegender" / run.info.run_id / "artifacts/note.txt").is_file()
    assert sorted(filled.rglob("*")) == before


def test_a_database_copied_alone_keeps_the_artifacts_it_has(filled: Path, tmp_path: Path) -> None:
    shutil.copy(filled / "mlflow.db", tmp_path / "mlflow.db")
    connection.connect(tmp_path)
    assert note() == "kept"


def test_a_linked_store_stays_where_it_is(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").symlink_to(filled / "mlflow.db")
    assert connection.connect(tmp_path) == 0
    assert note() == "kept"


def test_addresses_elsewhere_are_left_alone(filled: Path, tmp_path: Path) -> None:
    root = moved(filled, tmp_path / "copy")
    others = ["s3://bucket/mlruns/9", f"{filled.as_uri()}-not/mlruns/9", "models:/m-1", None]
    with closing(sqlite3.connect(root / "mlflow.db")) as opened:
        for place, address in enumerate(others, start=100):
            opened.execute(
                "INSERT INTO experiments (experiment_id, name, artifact_location) VALUES (?, ?, ?)",
                (place, f"other {place}", address),
            )
        opened.commit()
    assert relocate(root, "facegender") > 0
    with closing(sqlite3.connect(root / "mlflow.db")) as opened:
        rows = opened.execute(
            "SELECT artifact_location FROM experiments WHERE experiment_id >= 100 "
            "ORDER BY experiment_id"
        ).fetchall()
    assert [address for (address,) in rows] == others


def test_a_new_store_keeps_all_artifacts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is made from, and also when the environment names it, as MLflow does itself."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    connection.connect(root, f"sqlite:///{root / 'mlflow.db'}")
    locations = {one.name: one.artifact_location for one in mlflow.search_experiments()}
    assert locations == {
        "Default": str(root / "mlruns" / "0"),
        "facegender": (root / "mlruns" / "facegender").as_uri(),
    }


def test_no_store_or_an_empty_one_is_nothing_to_relocate(tmp_path: Path) -> None:
    assert relocate(tmp_path, "facegender") == 0
    sqlite3.connect(tmp_path / "mlflow.db").close()
    assert relocate(tmp_path, "facegender") == 0


def test_a_deleted_experiment_is_a_clear_error(filled: Path, tmp_path: Path) -> None:
    root = moved(filled, tmp_path / "copy")
    connection.connect(root)
    experiment = mlflow.get_experiment_by_name("facegender")
    assert experiment is not None
    mlflow.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match="mlflow experiments restore"):
        connection.connect(root)


def _other_version(database: Path) -> None:
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


def _folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda file: os.truncate(file, 200_000), "malformed", id="cut off"),
        pytest.param(lambda file: file.write_bytes(b"x" * 9_999), "not a database", id="text"),
        pytest.param(_other_version, "mlflow db upgrade", id="another version"),
        # As Docker makes for a bind mount of a file that does not exist; MLflow waits for hours.
        pytest.param(_folder, "is not a file", id="folder"),
    ],
)
def test_a_store_that_cannot_be_used_is_a_clear_error(
    filled: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    root = moved(filled, tmp_path / "copy")
    spoil(root / "mlflow.db")
    with pytest.raises(UserError, match=words):
        connection.connect(root)


def test_a_run_that_is_deleted_at_work_is_a_clear_error(tmp_path: Path) -> None:
    connection.connect(tmp_path)

    def delete_at_work() -> None:
        with runs.training_run(name="a", params={}, tags={}, manifests={}) as run:
            mlflow.delete_run(run.info.run_id)
            log.log_epoch(1, {"loss": 0.5})

    with pytest.raises(UserError, match="was deleted while"):
        delete_at_work()


@pytest.mark.campaign  # in short: the sweep in test_experiments.py
def test_four_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    epochs = 150
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOG_HARD, tmp_path, f"run {number}", str(epochs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(4)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert not any("locked" in output for output in outputs)
    connection.connect(tmp_path)
    runs = mlflow.search_runs(experiment_names=["facegender"], output_format="list")
    assert sorted(run.info.run_name for run in runs) == [f"run {number}" for number in range(4)]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert len(run.data.params) == 50
        for metric in ("loss", "accuracy", "val_loss"):
            history = MlflowClient().get_metric_history(run.info.run_id, metric)
            assert [point.step for point in history] == list(range(1, epochs + 1))


def test_a_process_killed_while_it_fills_the_database_leaves_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOG_HARD, str(tmp_path), "run", "1"]
    process = subprocess.Popen(command, env=environment())
    while not ((new := tmp_path / "mlflow.db.new").is_file() and new.stat().st_size):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    subprocess.run(command, env=environment(), check=True)
    assert sorted(path.name for path in tmp_path.glob("mlflow.db*")) == ["mlflow.db"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(
        [client.get_experiment_by_name(connection.EXPERIMENT).experiment_id]
    )
    assert run.info.status == "FINISHED"


def test_a_run_whose_process_was_killed_is_marked_and_one_at_work_is_not(
    filled: Path, tmp_path: Path, start: Callable[..., subprocess.Popen]
) -> None:
    root = moved(filled, tmp_path / "copy")
    connection.connect(root)
    killed, working = start(root, "killed"), start(root, "working")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    connection.connect(root)
    assert find_run("killed").info.status == "KILLED"
    assert find_run("working").info.status == "RUNNING"
    working.stdin.close()
    assert working.wait() == 0
    assert find_run("working").info.status == "FINISHED"
    assert list(root.rglob("running.lock")) == []


WAIT = """
import sys
from pathlib import Path
from facegender.tracking import connection, runs
connection.connect(Path(sys.argv[1]))
with runs.training_run(name=sys.argv[2], params={}, tags={}, manifests={}):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start() -> Callable[..., subprocess.Popen]:
    """Return a function that starts a process with an open run."""
    processes = []

    def begin(root: Path, name: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WAIT, root, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


# A stage in small: what the real ones do around their work.
STAGE = """
import sys, time
from pathlib import Path
from facegender.runtime.dvc_context import project_root, run_name_and_tags, tracking_uri
from facegender.runtime.entry_points import run_stage
from facegender.errors import UserError

def main():
    how = sys.argv[1]
    print("https://user:hunter22@host/x?token=abcdef", "s3cr3t-value")
    if how == "early":
        raise UserError("no such file")
    from facegender.tracking import connection, runs
    connection.connect(project_root(), tracking_uri())
    name, tags = run_name_and_tags()
    with runs.training_run(name=name, params={}, tags=tags, manifests={}):
        print("begun", flush=True)
        if how == "bug":
            raise ValueError("a bug with s3cr3t-value in it")
        time.sleep(600)

if __name__ == "__main__":
    run_stage(main)
"""


@pytest.mark.parametrize(
    ("how", "sent", "code", "said"),
    [
        ("early", None, 1, "UserError: no such file"),
        ("bug", None, 1, "ValueError: a bug"),
        ("wait", signal.SIGTERM, 143, "_Terminated"),
        ("wait", signal.SIGINT, 130, "KeyboardInterrupt"),
    ],
)
def test_a_stage_that_fails_leaves_a_failed_run_with_its_log(
    filled: Path, tmp_path: Path, how: str, sent: int | None, code: int, said: str
) -> None:
    root = moved(filled, tmp_path / "copy")
    (tmp_path / "train.py").write_text(STAGE)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "train.py", how],
        cwd=root,
        env=environment()
        | {
            "DVC_EXP_NAME": f"exp-{code}-{how}",
            "KAGGLE_API_TOKEN": "s3cr3t-value",
            # A run that a shell's variable names is not this stage's.
            "MLFLOW_RUN_ID": "0" * 32,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # SIGINT may be ignored here, as in a shell's background jobs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    if sent is not None:
        assert process.stdout is not None
        while "begun" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(sent)
    error = process.communicate()[1]
    assert process.returncode == code, error
    connection.connect(root)
    run = find_run(f"exp-{code}-{how}")
    assert run.info.status == "FAILED"
    log = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/log/train.txt")
    assert said in log
    assert "https://***@host/x?token=***" in log
    for secret in ("hunter22", "abcdef", "s3cr3t-value"):
        assert secret not in log


def test_the_remotes_password_is_not_logged(filled: Path, tmp_path: Path) -> None:
    root = moved(filled, tmp_path / "copy")
    script = root / "log.py"
    script.write_text(LOG_HARD)
    address = "https://user:hunter22@example.org/faces.git"
    init_repository(root)
    checked_git(root, "remote", "add", "origin", address)
    checked_git(root, "commit", "--quiet", "--allow-empty", "--message", "start")
    subprocess.run([sys.executable, script, root, "remote", "1"], cwd=root, check=True)
    connection.connect(root)
    tags = find_run("remote").data.tags
    assert tags["mlflow.source.git.repoURL"] == "https://example.org/faces.git"
    assert "hunter22" not in json.dumps(tags)
