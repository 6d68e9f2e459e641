"""`facegender promote`, `facegender rollback` and `facegender models`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from facegender.cli.arguments import non_empty
from facegender.errors import UserError
from facegender.runtime.dvc_context import project_root, tracking_uri
from facegender.runtime.redaction import first_line, secrets_of


def add_promote(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Register the model of a run and judge it, compared with the champion if there is one. "
        "The model gets the alias `challenger`, and `champion` if it passes. `mlflow models serve "
        "-m models:/facegender@champion` serves the champion it finds when it starts. Exit code 1 "
        "if the model does not pass; the champion then stays."
    )
    parser.add_argument(
        "mlflow_run",
        metavar="RUN",
        help="id of an MLflow run, the beginning of one, or a run's name",
    )
    parser.add_argument(
        "--force", action="store_true", help="promote the model even if it fails; needs --reason"
    )
    parser.add_argument(
        "--reason",
        type=non_empty,
        metavar="TEXT",
        help="why the model is promoted by force; stored with the version",
    )
    parser.add_argument(
        "--accept-rule-change",
        action="store_true",
        help="judge by the gate's rules in the work tree even where they are looser than the "
        "committed ones: those of HEAD, main and the champion",
    )
    parser.set_defaults(run=promote, parser=parser)


def promote(args: argparse.Namespace) -> int:
    """Promote a run's model, or explain why it does not pass."""
    if args.force != (args.reason is not None):
        args.parser.error("--force and --reason need each other")
    with open_registry() as (registry, lock):
        from facegender.gate.promotion import judge_promotion, may_be_champion
        from facegender.gate.verdict import as_markdown
        from facegender.params import load_params

        root = project_root()
        params = load_params(root / "params.yaml")

        run = registry.find_run(args.mlflow_run)

        def judge(candidate: Path, champion: Path | None) -> Any:
            report = judge_promotion(
                root,
                candidate,
                champion,
                params,
                champion_commit=registry.champion_commit(),
                champion_model=registry.fetch_champion_model,
                champion_manifests=registry.manifest_digests(),
                manifests=registry.manifest_digests(run.info.run_id),
                accept_rule_change=args.accept_rule_change,
            )
            return registry.Verdict(may_be_champion(report), as_markdown(report))

        done = registry.promote(run, judge, lock=lock, force_reason=args.reason)
    name = f"version {done.version} (run {run.info.run_id[:12]}, {run.info.run_name})"
    if done.verdict is None:
        print(f"{name} is the champion already")
        return 0
    print(done.verdict.report)
    before = (
        f"version {done.former} stays the champion" if done.former else "there is still no champion"
    )
    if not done.champion:
        raise UserError(
            f"{name} does not pass the gate (see above), so {before}. To promote it anyway, give a "
            f"reason: `facegender promote {args.mlflow_run} --force --reason TEXT`."
        )
    how = "passes the gate and" if done.verdict.passed else "fails the gate, but by force"
    after = f", after version {done.former}; `facegender rollback` brings that back"
    print(f"{name} {how} is the champion now{after if done.former else ''}")
    return 0


def add_rollback(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Bring the previous champion back. Repeat the command to bring back the one before it."
    )
    parser.set_defaults(run=rollback)


def rollback(_: argparse.Namespace) -> int:
    """Bring the previous champion back."""
    with open_registry() as (registry, lock):
        before, now = registry.rollback(lock=lock)
    print(f"version {now} is the champion again, version {before} no longer")
    return 0


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = "List the versions registered by `facegender promote`."
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.set_defaults(run=models)


def models(args: argparse.Namespace) -> int:
    """List the registered versions."""
    with open_registry() as (registry, _):
        versions = registry.list_versions()
    for item in versions:
        if args.json:
            print(json.dumps(asdict(item)))
            continue
        accuracy = "" if item.test_accuracy is None else f"  test accuracy {item.test_accuracy:.4f}"
        forced = f"  by force: {item.forced_reason}" if item.forced_reason else ""
        state = f"{', '.join(item.aliases):<10}  gate: {item.gate or 'none':<6}"
        run = f"run {item.run_id[:12]} ({item.run_name})"
        print(f"version {item.version:<3}  {state}{accuracy}  {run}{forced}")
    if not versions:
        print("no model is registered: `facegender promote RUN` registers one", file=sys.stderr)
    return 0


@contextmanager
def open_registry() -> Iterator[tuple[ModuleType, Path]]:
    """Connect to MLflow; yield the registry and its lock file. MLflow's errors become UserError."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    from facegender.tracking import connection, registry

    root = project_root()
    try:
        connection.connect(root, tracking_uri(), required=True)
        yield registry, root / ".dvc" / "tmp" / "registry.lock"
    except MlflowException as error:
        if connection.is_refusal(error):
            raise UserError(f"MLflow refused the login: {connection.CHECK_LOGIN}.") from None
        # Wrapped: the request itself failed.
        if isinstance(error.__cause__ or error.__context__, RequestException):
            raise UserError(
                f"MLflow's server does not answer ({connection.short_error(error)}). Start it, or "
                "correct MLFLOW_TRACKING_URI."
            ) from None
        reason = first_line(error, secrets_of(os.environ))
        raise UserError(
            f"MLflow refused the request: {reason}. `facegender models` shows the current state."
        ) from None
