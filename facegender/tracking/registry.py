"""MLflow's model registry: which model is served, and how another replaces it.

All versions belong to one registered model. The alias `challenger` marks the version judged last,
`champion` the one that is served. Setting `champion` is a single write at the end, so a failure
before it leaves the champion unchanged. A tag of the registered model lists former champions, for
`rollback`. `connection.connect` chooses the store.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from facegender.errors import UserError
from facegender.tracking.connection import EXPERIMENT
from facegender.tracking.log import fetch_results, is_lost, logged_models
from facegender.tracking.runs import RESTORED

REGISTERED_MODEL = "facegender"
CHAMPION = "champion"
CHALLENGER = "challenger"

# Tags. Of the registered model: former champions, the latest last. Of a version: the gate's
# verdict, and the reason for promoting it anyway.
_FORMER = "former_champions"
_GATE = "gate"
_FORCED = "forced_reason"

_FORMER_KEPT = 50
# The longest description that MLflow's databases accept.
_DESCRIPTION_LENGTH = 5000
_REPORT = "gate.md"
_LISTED = 10


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on a model; the report is Markdown."""

    passed: bool
    report: str


# Judges a run's results and the champion's, if any: folders such as the pipeline's metrics/.
Judge = Callable[[Path, Path | None], Verdict]


@dataclass(frozen=True)
class Promotion:
    """The outcome of a promotion.

    Attributes:
        version: version of the run's model.
        former: version of the champion before, or None.
        verdict: verdict of the gate, or None if the version already was the champion.
        champion: whether the version is now the champion.
    """

    version: int
    former: int | None
    verdict: Verdict | None
    champion: bool


@dataclass(frozen=True)
class Version:
    """A registered version, as `facegender models` shows it."""

    version: int
    aliases: tuple[str, ...]
    run_id: str
    run_name: str | None
    test_accuracy: float | None
    gate: str | None
    forced_reason: str | None


def find_run(wanted: str) -> Run:
    """Return the run of this id, prefix of an id, or name. Raises UserError unless one matches."""
    runs: Sequence[Run] = mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")
    found = [run for run in runs if wanted and run.info.run_id == wanted] or [
        run
        for run in runs
        if wanted and (run.info.run_name == wanted or run.info.run_id.startswith(wanted))
    ]
    if len(found) == 1:
        return found[0]
    # Newest first, as MLflow lists them.
    listed = "; ".join(_describe(run) for run in (found or runs)[:_LISTED])
    more = "; ..." if len(found or runs) > _LISTED else ""
    if found:
        raise UserError(
            f"{wanted!r} is ambiguous, {len(found)} runs have this name or an id that starts with "
            f"it: {listed}{more}. Give more of the id."
        )
    raise UserError(
        f"MLflow has no run with the id or name {wanted!r}. "
        + (
            f"It has: {listed}{more}."
            if runs
            else "It has no runs yet; `dvc repro` makes one, or, of results that are up to date, "
            "`dvc repro --force --single-item evaluate`."
        )
    )


def _describe(run: Run) -> str:
    accuracy = run.data.metrics.get("test_accuracy")
    started = datetime.fromtimestamp(run.info.start_time / 1000).strftime("%Y-%m-%d %H:%M")
    shown = "not evaluated" if accuracy is None else f"test accuracy {accuracy:.4f}"
    return f"{run.info.run_id[:12]} ({run.info.run_name}, {started}, {shown})"


def promote(run: Run, judge: Judge, *, lock: Path, force_reason: str | None = None) -> Promotion:
    """Register a run's model, compare it with the champion, and make it champion if it passes.

    A run is registered once. Its version becomes `challenger`, with the gate's report as
    description; a version that becomes champion loses that alias.

    Args:
        lock: file that serializes promotions on this machine. Those of other machines are noticed.
        force_reason: recorded reason to promote a version that fails, or None.

    Raises:
        UserError: the run did not finish, has no results or no model, or the champion changed
            at the same time.
    """
    if run.info.status != "FINISHED":
        raise UserError(
            f"The run {_describe(run)} is {run.info.status}; only a finished run can be promoted. "
            + ("Wait until it ends, or name" if run.info.status == "RUNNING" else "Name")
            + " another run."
        )
    if RESTORED in run.data.tags:
        raise UserError(_whose_results(run))
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock), tempfile.TemporaryDirectory() as folder:
        results = fetch_results(run.info.run_id, Path(folder) / "candidate")
        model_id = _logged_model(run)
        client = MlflowClient()
        version = _register(client, run, model_id)
        number = int(version.version)
        champion = _champion(client)
        if champion is not None and int(champion.version) == number:
            return Promotion(number, number, None, champion=True)
        former = None if champion is None else int(champion.version)

        client.set_registered_model_alias(REGISTERED_MODEL, CHALLENGER, str(number))
        try:
            current = None
            if champion is not None:
                current = fetch_results(champion.run_id or "", Path(folder) / "champion")
        except UserError as error:
            verdict = Verdict(False, f"Version {former}, the champion, cannot be judged: {error}")
        else:
            verdict = judge(results, current)
        forced = force_reason if not verdict.passed else None
        _record(client, run, number, verdict, forced)
        if not verdict.passed and forced is None:
            return Promotion(number, former, verdict, champion=False)

        now = _champion(client)
        if (None if now is None else int(now.version)) != former:
            raise UserError(
                "Somebody else changed the champion while this run was compared with the former "
                "one. `facegender models` shows the new one; promote again to compare with it."
            )
        if former is not None:
            # Before the alias: `rollback` skips a former champion that is still the champion.
            _write_former(client, [*_former(client), former])
        client.set_registered_model_alias(REGISTERED_MODEL, CHAMPION, str(number))
        client.delete_registered_model_alias(REGISTERED_MODEL, CHALLENGER)
        return Promotion(number, former, verdict, champion=True)


def _whose_results(run: Run) -> str:
    """Return which run to promote instead of one without files, whose results DVC already had."""
    same: Sequence[Run] = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.`dvc.lock` = '{run.data.tags.get('dvc.lock', '')}' "
        "and attributes.status = 'FINISHED'",
        output_format="list",
    )
    trained = [_describe(one) for one in same if RESTORED not in one.data.tags]
    name = run.info.run_name
    return f"DVC already had the results of {name}, so its run has no model. " + (
        f"Promote the run that trained it: {'; '.join(trained[:_LISTED])}."
        if trained
        else f"`dvc exp apply {name}`, then `dvc repro --force --single-item evaluate`, log a run "
        "that has it."
    )


def champion_commit() -> str | None:
    """Return the commit of the code that made the champion, or None if it is not recorded."""
    client = MlflowClient()
    champion = _champion(client)
    if champion is None:
        return None
    return client.get_run(champion.run_id or "").data.tags.get(MLFLOW_GIT_COMMIT)


def fetch_champion_model(folder: Path) -> Path:
    """Download the champion's `.tflite` file into a folder. Raises UserError if it is lost."""
    uri = f"models:/{REGISTERED_MODEL}@{CHAMPION}"
    try:
        fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise UserError(f"Cannot read the champion's model: {error}") from error
    models = sorted((fetched / "artifacts").glob("*.tflite"))
    if len(models) != 1:
        raise UserError(f"The champion has {len(models)} .tflite files, where one is expected.")
    return models[0]


def manifest_digests(run_id: str | None = None) -> list[str]:
    """Return the start of each SHA-256 of the manifests that a run, or the champion's, logged."""
    client = MlflowClient()
    if run_id is None:
        champion = _champion(client)
        run_id = champion.run_id if champion else None
    inputs = client.get_run(run_id).inputs if run_id else None
    return [each.dataset.digest for each in inputs.dataset_inputs] if inputs else []


def rollback(*, lock: Path) -> tuple[int, int]:
    """Restore the former champion; a second call restores the one before it.

    Returns:
        The version that was the champion, and the one that is now.

    Raises:
        UserError: the registry has no champion, or no former one, or its model is lost.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        client = MlflowClient()
        champion = _champion(client)
        if champion is None:
            raise UserError(
                "The registry has no champion to roll back; `facegender promote RUN` makes one."
            )
        number = int(champion.version)
        former = _former(client)
        known = {int(version.version) for version in _versions()} - {number}
        while former and former[-1] not in known:
            former.pop()
        if not former:
            raise UserError(
                f"Version {number} is the champion, and no earlier one can be restored. "
                "`facegender promote RUN` makes another the champion."
            )
        back = former.pop()
        if is_lost(f"models:/{REGISTERED_MODEL}/{back}"):
            raise UserError(
                f"The model of version {back}, the previous champion, is lost, so version "
                f"{number} stays the champion. To go further back, delete version {back} in MLflow "
                "(`make ui`, Models), then `facegender rollback`."
            )
        client.set_registered_model_alias(REGISTERED_MODEL, CHAMPION, str(back))
        _write_former(client, former)
        return number, back


def pin_version(uri: str) -> str:
    """Replace the alias in a model's address by its version, which no promotion changes.

    Args:
        uri: models:/NAME@ALIAS, or another address that MLflow knows, which is returned unchanged.

    Raises:
        UserError: no version has the alias.
    """
    name, at, alias = uri.removeprefix("models:/").rpartition("@")
    if not uri.startswith("models:/") or not at:
        return uri
    try:
        version = MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        raise UserError(
            f"MLflow has no {uri}. `facegender promote RUN` makes a champion, `facegender models` "
            "lists the versions."
        ) from None
    return f"models:/{name}/{version.version}"


def list_versions() -> list[Version]:
    """Return all registered versions, the newest first."""
    client = MlflowClient()
    model = _model(client)
    aliases: dict[int, list[str]] = {}
    for alias, number in (model.aliases if model else {}).items():
        aliases.setdefault(int(number), []).append(alias)
    return [
        _summary(client, version, tuple(sorted(aliases.get(int(version.version), []))))
        for version in _versions()
    ]


def _summary(client: MlflowClient, version: ModelVersion, aliases: tuple[str, ...]) -> Version:
    run_id = version.run_id or ""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    return Version(
        version=int(version.version),
        aliases=aliases,
        run_id=run_id,
        run_name=run.info.run_name if run else None,
        test_accuracy=run.data.metrics.get("test_accuracy") if run else None,
        gate=version.tags.get(_GATE),
        forced_reason=version.tags.get(_FORCED),
    )


def _logged_model(run: Run) -> str:
    """Return the id of the newest model that a run logged. Raises UserError if it is lost."""
    logged = logged_models(run)
    if not logged:
        raise UserError(
            f"The run {_describe(run)} has logged no model: promote one that `dvc repro` or "
            "`dvc exp run` finished."
        )
    if is_lost(logged[0].model_uri):
        raise UserError(
            f"The model that the run {_describe(run)} logged is lost. While `models/` still has "
            "it, `dvc repro --force --single-item evaluate` logs it again. Or promote another run."
        )
    return logged[0].model_id


def _register(client: MlflowClient, run: Run, model_id: str) -> ModelVersion:
    """Return the version of a logged model; create it if it is missing."""
    try:
        client.create_registered_model(
            REGISTERED_MODEL,
            description="Labels faces by perceived gender: female or male, as a dataset records "
            "it, not a fact about a person. `facegender promote` and `rollback` set the aliases.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    for version in _versions():
        if version.source == source:
            return version
    return client.create_model_version(
        REGISTERED_MODEL, source, run_id=run.info.run_id, model_id=model_id
    )


def _record(
    client: MlflowClient, run: Run, number: int, verdict: Verdict, forced: str | None
) -> None:
    """Write the verdict where MLflow's pages show it."""
    client.log_text(run.info.run_id, verdict.report, _REPORT)
    text = f"**Promoted by force.** {forced}\n\n{verdict.report}" if forced else verdict.report
    if len(text) > _DESCRIPTION_LENGTH:
        rest = f"\n\n... The full report is the artifact `{_REPORT}` of the run."
        text = text[: _DESCRIPTION_LENGTH - len(rest)] + rest
    client.update_model_version(REGISTERED_MODEL, str(number), text)
    said = "passed" if verdict.passed else "failed"
    client.set_model_version_tag(REGISTERED_MODEL, str(number), _GATE, said)
    if forced:
        client.set_model_version_tag(REGISTERED_MODEL, str(number), _FORCED, forced)
    else:
        client.delete_model_version_tag(REGISTERED_MODEL, str(number), _FORCED)


def _versions() -> list[ModelVersion]:
    found = mlflow.search_model_versions(filter_string=f"name='{REGISTERED_MODEL}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def _model(client: MlflowClient) -> RegisteredModel | None:
    try:
        return client.get_registered_model(REGISTERED_MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _champion(client: MlflowClient) -> ModelVersion | None:
    model = _model(client)
    number = model.aliases.get(CHAMPION) if model else None
    return None if number is None else client.get_model_version(REGISTERED_MODEL, number)


def _former(client: MlflowClient) -> list[int]:
    tag = client.get_registered_model(REGISTERED_MODEL).tags.get(_FORMER, "")
    return [int(number) for number in tag.split(",") if number]


def _write_former(client: MlflowClient, former: list[int]) -> None:
    text = ",".join(str(number) for number in former[-_FORMER_KEPT:])
    client.set_registered_model_tag(REGISTERED_MODEL, _FORMER, text)
