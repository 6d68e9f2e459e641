"""Start MLflow's pages for this repository's runs, and print the addresses that show them."""

import argparse
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from facegender.cli.arguments import whole_number
from facegender.cli.registry import open_registry
from facegender.errors import UserError
from facegender.runtime.dvc_context import project_root, tracking_uri
from facegender.runtime.entry_points import run_command

HOST = "127.0.0.1"
_START_SECONDS = 300
_POLL_SECONDS = 0.2


def main() -> int:
    """Print the addresses; run the server unless MLFLOW_TRACKING_URI names one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=whole_number, default=5000, help="default: %(default)s")
    args = parser.parse_args()
    uri = tracking_uri()
    remote = uri if uri and uri.startswith(("http://", "https://")) else None
    if remote is None:
        _check_port(args.port)

    import mlflow

    from facegender.tracking import mlflow_pages

    with open_registry():
        if remote:
            _print_addresses(remote.rstrip("/"), shared=False)
            return 0
        mlflow_pages.share_view()
    command = server_command(args.port, mlflow.get_tracking_uri())
    environment = {
        **os.environ,
        # For the server and its pages.
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # Workers for jobs of the GenAI pages: slow to start, and unused here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Notes to MLflow's programmers.
        "PYTHONWARNINGS": "ignore",
    }
    # Not in the terminal's group: on Ctrl-C the server prints a traceback, on SIGTERM it does not.
    with subprocess.Popen(
        command, cwd=project_root(), env=environment, start_new_session=True
    ) as server:
        try:
            _wait_for(server, args.port)
            _print_addresses(f"http://{HOST}:{args.port}", shared=True)
            print("Ctrl-C stops the server.", flush=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)


def server_command(port: int, store: str) -> list[str]:
    """Return the command that serves a store's pages, on this machine only."""
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", store]
    return [*command, "--workers", "1", "--uvicorn-opts", "--log-level warning"]


def _check_port(port: int) -> None:
    with socket.socket() as free:
        # As the server does; otherwise a port stays taken for a minute after its last use.
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"Port {port} cannot be used ({reason}). Stop what uses it, or choose "
                "another: `make ui PORT=5050`."
            ) from None


def _wait_for(server: subprocess.Popen, port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while not answers(port):
        if server.poll() is not None:
            raise UserError(f"The MLflow server ended with exit code {server.returncode}.")
        if time.monotonic() > end:
            raise UserError(f"The MLflow server did not answer within {_START_SECONDS} seconds.")
        time.sleep(_POLL_SECONDS)


def answers(port: int) -> bool:
    """Return whether an MLflow server is ready on a port of this machine."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def _print_addresses(server: str, *, shared: bool) -> None:
    from facegender.tracking import mlflow_pages

    print(f"runs:    {mlflow_pages.runs_page(server, shared=shared)}")
    comparison = mlflow_pages.compare_page(server) or "two evaluated runs are needed"
    print(f"compare: {comparison}", flush=True)


if __name__ == "__main__":
    run_command(main)
