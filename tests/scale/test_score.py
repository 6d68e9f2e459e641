"""`facegender score` on a real Spark of two cores, by a registered model, beside `predict`."""

import csv
import io
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facegender.data.image_files import find_images
from facegender.data.images import encode_png
from facegender.tracking import registry
from tests.bad_images import BAD, GOOD, write_jpgs
from tests.conftest import Exported, fill, free_port
from tests.pipeline.conftest import HOST, Clone, running
from tests.scale.servers import BUCKET, listens, s3_server, stored
from tests.unit.conftest import RUNS, log_run

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(
        not shutil.which("java"),
        reason="needs Java: on Debian, apt-get install default-jre-headless",
    ),
]

SCORE = ("facegender", "score", "--master", "local[2]")


@pytest.fixture(scope="module")
def champion(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A root with a store whose champion is the small model, and images, good and bad ones."""
    root = tmp_path_factory.mktemp("score")
    run = mlflow.get_run(log_run(root, exported, "good", RUNS["good"]))

    def passes(candidate: Path, former: Path | None) -> registry.Verdict:
        return registry.Verdict(True, "fit")

    assert registry.promote(run, passes, lock=root / "lock").champion
    sure = {f"noise-{number}": encode_png(image) for number, image in enumerate(exported.images)}
    write_jpgs(root / "in" / "noise", sure)
    write_jpgs(root / "in" / "forms", GOOD)
    write_jpgs(root / "in" / "bad", {name: content for name, (content, _) in BAD.items()})
    return Clone(root)


@pytest.fixture(scope="module")
def expected(champion: Clone, exported: Exported) -> pd.DataFrame:
    """What `predict` says of the images."""
    model = ("--model", str(exported.float32))
    done = champion.run("facegender", "predict", "--csv", *model, "in", check=False)
    assert done.returncode == 1, done.stderr
    table = pd.DataFrame(csv.DictReader(io.StringIO(done.stdout))).replace("", None)
    table = table[["image", "label", "probability", "error"]]  # whole images have no boxes
    assert table["error"].notna().sum() == len(BAD)
    # Else all of this could be true of a model that says the same of every image.
    assert table["probability"].nunique() > 50
    return table.astype({"probability": float})


def same(output: Path, expected: pd.DataFrame) -> None:
    """Assert that an output has each image once, and what `predict` says of it."""
    scored = pd.read_parquet(output)
    assert scored.columns.tolist() == expected.columns.tolist()
    assert len(scored) == len(expected)
    pair = scored.merge(expected, on="image", suffixes=("", "_expected"), validate="1:1")
    assert len(pair) == len(expected)
    for column in ("label", "error"):
        both = pair[[column, f"{column}_expected"]].fillna("")
        assert both[column].tolist() == both[f"{column}_expected"].tolist()
    assert pair["probability"].isna().equals(pair["error"].notna())
    assert pair["probability"].equals(pair["probability_expected"])


def test_a_folder_is_scored_as_predict_does(champion: Clone, expected: pd.DataFrame) -> None:
    done = champion.run(*SCORE, "in", "folder.parquet", "--part-images", "40")
    assert done.stdout == (
        f"folder.parquet: {len(expected)} images, by models:/facegender/1; "
        f"{len(BAD)} could not be read: column error\n"
    )
    # Spark, Java and MLflow say nothing that a user could use.
    assert done.stderr == ""
    output = champion.root / "folder.parquet"
    assert len(list(output.glob("part-*.parquet"))) == -(-len(expected) // 40)
    assert (output / "_SUCCESS").exists()
    same(output, expected)
    # A part is lost, and the last word with it: that part alone is scored again, under the names of
    # the first run, though INPUT is written otherwise.
    lost, *kept = sorted(output.glob("part-*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    lost.unlink()
    (output / "_SUCCESS").unlink()
    done = champion.run(*SCORE, str(champion.root / "in"), "folder.parquet", "--part-images", "40")
    assert f"{len(expected)} images, {len(expected) - 40} of them from before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    same(output, expected)
    # Once more: nothing is left to do, which needs no Spark.
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    done = champion.run(*SCORE, "in", "folder.parquet")
    assert f"{len(expected)} images, {len(expected)} of them from before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


@pytest.mark.campaign  # in short: the test above, which takes a part away
def test_a_run_that_was_killed_goes_on(champion: Clone, expected: pd.DataFrame) -> None:
    command = (*SCORE, "in", "killed.parquet", "--part-images", "3")
    process = subprocess.Popen(
        command, cwd=champion.root, env=champion.environment(), start_new_session=True
    )
    output = champion.root / "killed.parquet"
    try:
        while len(list(output.glob("part-*.parquet"))) < 4:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        # Driver, Java and workers at once.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    parts = -(-len(expected) // 3)
    assert 4 <= len(kept) < parts
    assert not (output / "_SUCCESS").exists()
    # A file that the kill cut short.
    (output / ".part-000000.parquet.0.partial").write_bytes(b"PAR1")
    # A part of the plan is lost: its task fails. Those before it are kept all the same.
    plan = output / f"_score/plan/{parts - 1:06}.json"
    names = plan.read_text()
    plan.unlink()
    done = champion.run(*command, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Spark does not finish: FileNotFoundError: ")
    assert "Traceback" not in done.stderr
    Path(done.stderr.split("Spark's log: ")[1].strip()).unlink()
    assert len(kept) < len(list(output.glob("part-*.parquet"))) < parts
    assert not (output / "_SUCCESS").exists()
    plan.write_text(names)
    done = champion.run(*command)
    assert "of them from before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    same(output, expected)


def test_java_that_does_not_start_is_told(champion: Clone, tmp_path: Path) -> None:
    java = tmp_path / "bin/java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho this Java is too old >&2\nexit 1\n")
    java.chmod(0o755)
    command = (*SCORE, "in", "unstarted.parquet")
    done = champion.run(*command, check=False, JAVA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Spark does not start: ")
    log = Path(done.stderr.split("Spark's log: ")[1].strip())
    assert "this Java is too old" in log.read_text()
    log.unlink()


@pytest.fixture
def cluster(champion: Clone, tmp_path: Path) -> Iterator[str]:
    """Run a master and a worker of Spark's own kind of cluster, and give its address."""
    import pyspark

    program = Path(pyspark.__file__).parent / "bin/spark-class"
    port = free_port()
    address = f"spark://{HOST}:{port}"
    places = {"SPARK_LOCAL_DIRS": str(tmp_path / "local"), "SPARK_WORKER_DIR": str(tmp_path)}
    environment = champion.environment(SPARK_LOCAL_IP=HOST, **places)
    options = ("--host", HOST, "--webui-port", "0")
    commands = {
        "Master": (*options, "--port", str(port)),
        "Worker": (*options, "--cores", "2", "--memory", "1g", address),
    }
    with ExitStack() as servers:
        for name, words in commands.items():
            command = [str(program), f"org.apache.spark.deploy.{name.lower()}.{name}", *words]
            log = tmp_path / name
            servers.enter_context(running(command, environment, log, lambda: listens(port)))
        yield address


@pytest.mark.parametrize("by", ["Spark here", pytest.param("cluster", marks=pytest.mark.campaign)])
def test_parquet_is_scored_alike_and_abstains_when_asked(
    champion: Clone, expected: pd.DataFrame, by: str, request: pytest.FixtureRequest
) -> None:
    master = request.getfixturevalue("cluster") if by == "cluster" else "local[2]"
    names = [str(path) for path in find_images(champion.root / "in")]
    contents = [(champion.root / "in" / name).read_bytes() for name in names]
    table = pa.table({"path": [f"in/{name}" for name in names], "content": contents})
    pq.write_table(table, champion.root / "photos.parquet")
    champion.run(
        *("facegender", "score", "photos.parquet", f"{by}.parquet", "--part-images", "20"),
        *("--master", master, "--conf", f"spark.driver.host={HOST}"),
        *("--conf", "spark.ui.enabled=false", "--abstain-below", "0.7"),
        *("--model", "models:/facegender/1"),
    )
    sure = expected["probability"].sub(0.5).abs() >= 0.2
    label = expected["label"].where(sure | expected["label"].isna(), "uncertain")
    assert label.nunique() == 3
    same(champion.root / f"{by}.parquet", expected.assign(label=label))


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 server with the images, and the environment that names the server."""

    client: Any
    environment: dict[str, str]


@pytest.fixture(scope="module")
def s3(champion: Clone) -> Iterator[Bucket]:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "very-secret-testing"}
    with s3_server(keys) as (address, client):
        for name in find_images(champion.root / "in"):
            content = (champion.root / "in" / name).read_bytes()
            client.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=content)
        # Neither a photo nor below the prefix.
        client.put_object(Bucket=BUCKET, Key="in/notes.txt", Body=b"")
        client.put_object(Bucket=BUCKET, Key="into/a.jpg", Body=b"")
        names = {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        yield Bucket(client, keys | names)


@pytest.mark.campaign  # in short: a folder, above, and the errors of S3, below
def test_a_prefix_of_s3_is_scored_alike(
    champion: Clone, expected: pd.DataFrame, s3: Bucket, tmp_path: Path
) -> None:
    command = (*SCORE, f"s3a://{BUCKET}/in", f"s3a://{BUCKET}/out/scores.parquet")
    done = champion.run(*command, "--part-images", "60", **s3.environment)
    assert f"{len(expected)} images, by models:/facegender/1" in done.stdout
    written = {key: content for key, content in stored(s3.client).items() if key.startswith("out/")}
    parts = {key.split("/")[2] for key in written} - {"_score", "_SUCCESS"}
    assert len(parts) == -(-len(expected) // 60)
    assert not any(b"very-secret-testing" in content for content in written.values())
    fill(tmp_path, written)
    prefixed = expected.assign(image=f"s3a://{BUCKET}/" + expected["image"])
    same(tmp_path / "out/scores.parquet", prefixed)


def test_errors_of_s3_are_told(champion: Clone, s3: Bucket) -> None:
    command = (*SCORE, "s3a://nobody/in", "never.parquet")
    done = champion.run(*command, check=False, **s3.environment)
    assert done.returncode == 1
    assert "error: The request to object storage failed" in done.stderr
    assert "NoSuchBucket" in done.stderr
    assert "very-secret-testing" not in done.stderr
    command = (*SCORE, f"s3a://{BUCKET}/none", "never.parquet")
    done = champion.run(*command, check=False, **s3.environment)
    assert f"INPUT is empty: there is no image in s3a://{BUCKET}/none" in done.stderr
    assert not (champion.root / "never.parquet").exists()
