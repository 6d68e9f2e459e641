"""Check that Spark can run, open a session with its own log, and wait for its answer."""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from facegender.batch_scoring.tasks import MESSAGE_IMAGES
from facegender.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


def check_spark() -> None:
    """Raise UserError if pyspark or Java is missing."""
    try:
        import pyarrow  # noqa: F401
        import pyspark  # noqa: F401
    except ImportError:
        raise UserError(
            "pyspark is missing: `pip install 'facegender[spark]'`, or `make install-scale`."
        ) from None
    home = os.environ.get("JAVA_HOME")
    if not shutil.which("java", path=str(Path(home, "bin")) if home else None):
        raise UserError(
            f"There is no Java {f'in JAVA_HOME, {home}' if home else 'on PATH'}; Spark needs it: "
            "on Debian, `apt-get install openjdk-17-jre-headless`."
        )


@contextmanager
def spark_session(master: str, conf: Mapping[str, str]) -> Iterator["SparkSession"]:
    """Yield a session; `conf` overrides settings made here. Its log is kept only if Spark fails.

    Raises:
        UserError: Spark does not start or does not finish.
    """
    from py4j.protocol import Py4JError
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    settings = {
        "spark.master": master,
        "spark.app.name": "facegender score",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(MESSAGE_IMAGES),
        "spark.ui.showConsoleProgress": "false",
    }
    if master.startswith("local"):
        # Only this machine may connect.
        own = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        settings |= own | {"spark.ui.enabled": "false"}
    configured = SparkConf(loadDefaults=False).setAll(list({**settings, **conf}.items()))
    descriptor, log = tempfile.mkstemp(prefix="facegender-score-", suffix=".log")
    keep_log, session, gateway = False, None, None
    try:
        # What Java prints is needed only after a failure.
        with open(descriptor, "w") as output:  # noqa: PTH123 - a descriptor has no path
            gateway = launch_gateway(configured, {"stdout": output, "stderr": output})
        session = SparkSession(SparkContext(conf=configured, gateway=gateway))
        yield session
    except (Py4JError, PySparkException) as error:
        keep_log = True
        raise UserError(
            f"Spark does not {'start' if session is None else 'finish'}: {_cause(str(error))}. "
            f"Scored images are kept; the same command resumes. Spark's log: {log}"
        ) from None
    except BaseException:
        _log.warning("scored images are kept: the same `facegender score` command resumes")
        raise
    finally:
        if session is not None:
            with suppress(Exception):  # the session itself may have failed
                session.stop()
        if gateway is not None:
            # Java would end with this process; stop it now so that it closes its files first.
            gateway.proc.terminate()
            gateway.proc.wait()
        if not keep_log:
            Path(log).unlink()


def wait_with_progress(rows: "Future[list]", session: "SparkSession", *, total: int) -> list:
    """Wait for Spark's rows and return them; on a terminal, show how many of `total` are done."""
    tracker = session.sparkContext.statusTracker()
    with tqdm(total=total, unit="file", leave=False, disable=not sys.stderr.isatty()) as bar:
        while not wait([rows], timeout=_POLL_SECONDS).done:
            stages = map(tracker.getStageInfo, tracker.getActiveStageIds())
            bar.update(sum(stage.numCompletedTasks for stage in stages if stage) - bar.n)
    return rows.result()


def _cause(text: str) -> str:
    """Return the error of a worker's traceback, or else the first line of Spark's message."""
    lines = text.partition("Traceback (most recent call last):")[2].splitlines()
    for line in lines[1:]:
        if line and not line.startswith((" ", "\t")):
            return line.rstrip(".")
    return text.strip().partition("\n")[0].rstrip(".") or "unknown error"
