"""The command `facegender`."""

import argparse
import csv
import io
import json
import math
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from facegender.data.image_files import find_images
from facegender.errors import UserError
from facegender.inference.loading import load_predictors
from facegender.inference.prediction import Prediction, predict_images
from facegender.runtime.dvc_context import pipeline_paths, project_root, tracking_uri
from facegender.runtime.entry_points import run_command
from facegender.runtime.redaction import escape_controls, secrets_of, without_credentials

# No image is larger; standard input may have no end.
MAX_STDIN_BYTES = 500_000_000
# Fewer images are done before a bar could be read.
BAR_FROM = 50


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    run_command(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="facegender",
        description="Label face photos by perceived gender with the model of `dvc repro`; judge "
        "models, and choose the one that is served.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser(
        "predict",
        help="print the label and P(male) of images",
        description="Print the label and the probability of the label `male` for each image. The "
        "labels are two, female and male: the gender that the faces of a dataset were perceived "
        "to have. A label is no fact about a person. "
        "Exit code 1 when an image could not be read; the others are still printed.",
    )
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (searched through), or - for the bytes of one image on standard "
        "input",
    )
    predict.add_argument(
        "--model",
        type=Path,
        help="a .tflite file, or a .keras file, which takes seconds to load "
        "(default: models/model.tflite)",
    )
    predict.add_argument(
        "--threshold", type=float, default=0.5, help="P(male) from which the label is male (0.5)"
    )
    predict.add_argument(
        "--abstain-below",
        type=_confidence,
        default=0.5,
        metavar="P",
        help="answer `uncertain` when the likelier label has a probability below P, from 0.5 "
        "(never) to 1",
    )
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")
    predict.set_defaults(run=_predict)

    gate = commands.add_parser(
        "gate",
        help="refuse a model that is worse than the one before it",
        description="Judge the results in the work tree (run `dvc repro` first) by the floors of "
        "gate in params.yaml, and beside those of a baseline, image by image. "
        "Exit code 0: pass, perhaps with warnings; 1: a regression, or below a floor; 2: cannot "
        "tell, and why. docs/gate.md says how the verdict is reached.",
    )
    gate.add_argument(
        "--baseline",
        metavar="REV",
        help="a commit, branch, tag or DVC experiment to compare with (default: the merge base "
        "with main; on main, HEAD, or the commit before it if the results are those of HEAD)",
    )
    gate.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    gate.add_argument(
        "--accept-data-change",
        action="store_true",
        help="compare although the test set or its labels changed, or predictions are missing: "
        "unpaired, and so less sharply",
    )
    gate.add_argument(
        "--accept-rule-change",
        action="store_true",
        help="judge by the gate's rules in the work tree even where they are looser than the "
        "baseline's",
    )
    gate.add_argument(
        "--require-evidence",
        action="store_true",
        help="give no verdict (exit code 2) if the test set is too small to show a drop of "
        "accuracy as large as the tolerance",
    )
    gate.set_defaults(run=_gate)

    report = commands.add_parser(
        "report",
        help="write the results, compared with another commit's, on one page",
        description="Write the page of metrics/report.html with the gate's verdict on them beside "
        "another commit. It tells the results in metrics/ as they are; `make report` brings them "
        "up to date first. The page joins the MLflow run of the results, if this clone has it.",
    )
    report.add_argument(
        "--baseline",
        metavar="REV",
        help="as of `facegender gate`",
    )
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="HTML file to write (default: report.html)"
    )
    report.set_defaults(run=_report)

    sweep = commands.add_parser(
        "sweep",
        help="run a grid of parameters as DVC experiments, under one MLflow run",
        description="Run every combination of a grid's values as a DVC experiment, and mark the "
        "one with the lowest validation loss in MLflow. Exit code 1 when an experiment failed; "
        "the others are run all the same.",
    )
    sweep.add_argument(
        "grid", nargs="?", type=Path, help="YAML file (default: conf/sweep.yaml)", metavar="GRID"
    )
    sweep.add_argument("--jobs", type=int, default=1, help="experiments at the same time (1)")
    sweep.add_argument("--name", help="of the sweep (default: sweep- and a random number)")
    sweep.set_defaults(run=_sweep)

    relocate = commands.add_parser(
        "relocate",
        help="have MLflow find its artifacts after this folder was moved or copied",
        description="MLflow keeps where artifacts are as absolute paths. After this folder was "
        "moved or copied, this rewrites them; so do `make ui` and every run of the pipeline.",
    )
    relocate.set_defaults(run=_relocate)

    verify = commands.add_parser(
        "verify",
        help="find damaged data, which DVC takes for unchanged, and clear it away",
        description="Hash every output that dvc.lock records, in the work tree and in DVC's cache. "
        "Objects that are damaged are removed from the cache, so that `dvc repro` makes them again "
        "or `dvc pull` fetches them. Exit code 1 when something was damaged.",
    )
    verify.add_argument(
        "--remote",
        nargs="?",
        const="",
        metavar="NAME",
        help="fetch and hash the objects of a DVC remote, too (default: that of DVC), and remove "
        "damaged ones from it, so that `dvc push` sends them again",
    )
    verify.set_defaults(run=_verify)

    _add_worker(commands)
    _add_registry(commands)
    _add_score(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


def _add_worker(commands: Any) -> None:
    worker = commands.add_parser(
        "worker",
        help="help worker 0 to train, as another worker of TF_CONFIG",
        description="Take part in a training by several machines: train.strategy is multi_worker, "
        "TF_CONFIG names this machine as worker 1 or above, and `dvc repro` runs at worker 0, "
        "whose parameters hold. It needs the same commit and data/processed (`dvc pull "
        "preprocess`), and writes nothing. docs/scaling-training.md tells more.",
    )
    worker.add_argument(
        "--processed", type=Path, help="directory of the images (default: data/processed)"
    )
    worker.add_argument(
        "--wait",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="how long worker 0 may take to get to its training (3600)",
    )
    worker.set_defaults(run=_worker)


def _add_registry(commands: Any) -> None:
    promote = commands.add_parser(
        "promote",
        help="make a run's model the champion, which is served, if it passes the gate",
        description="Register the model of a run and have it judged, beside the champion if there "
        "is one. It gets the alias `challenger`, and if it passes `champion`: what `mlflow models "
        "serve -m models:/facegender@champion` serves when it starts next. Exit code 1 when it "
        "does not pass; the champion then stays.",
    )
    promote.add_argument(
        "mlflow_run", metavar="RUN", help="id of an MLflow run, its beginning, or a run's name"
    )
    promote.add_argument(
        "--force", action="store_true", help="promote it even if it fails; needs --reason"
    )
    promote.add_argument(
        "--reason", type=_reason, metavar="TEXT", help="why, which is kept with the version"
    )
    promote.set_defaults(run=_promote, parser=promote)
    rollback = commands.add_parser(
        "rollback",
        help="put the former champion back",
        description="Put the former champion back. Once more puts back the one before it.",
    )
    rollback.set_defaults(run=_rollback)
    models = commands.add_parser(
        "models",
        help="list the registered models, and which is the champion",
        description="List the versions that were registered by `facegender promote`.",
    )
    models.add_argument("--json", action="store_true", help="one JSON object a line")
    models.set_defaults(run=_models)


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="label millions of images on Spark, into Parquet",
        description="Label all images of INPUT with a registered model on Spark, and write OUTPUT: "
        "a folder of Parquet files with the columns of `predict --csv`, image, label, probability "
        "(of the label male) and error. An image that cannot be read is a row that says why; exit "
        "code 0 all the same. Killed or failed: the same command goes on, and each image is in "
        "OUTPUT once. Needs Java and the extra `spark` (docs/scaling-score.md).",
    )
    score.add_argument(
        "input",
        metavar="INPUT",
        help="a folder (searched through), a Parquet file, or folder of them, with one column of "
        "bytes of image files, or s3a://BUCKET/PREFIX",
    )
    score.add_argument(
        "output", metavar="OUTPUT", help="a new folder or s3a://BUCKET/PREFIX; or one to go on with"
    )
    score.add_argument(
        "--model",
        metavar="URI",
        default="models:/facegender@champion",
        help="of a model in MLflow (default: models:/facegender@champion)",
    )
    score.add_argument(
        "--abstain-below",
        type=_confidence,
        default=0.5,
        metavar="P",
        help="as of `facegender predict`",
    )
    score.add_argument(
        "--master",
        metavar="URL",
        default="local[*]",
        help="of Spark: this machine's cores (default: local[*]), or a cluster's, "
        "spark://HOST:PORT, yarn, ...",
    )
    score.add_argument(
        "--conf",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="of Spark, as of `spark-submit`; may be repeated",
    )
    score.add_argument(
        "--part-images",
        type=_count,
        default=1000,
        metavar="N",
        help="images in each file of OUTPUT, which are scored by one core, and again if that is "
        "killed (1000); as it was at first when a run goes on",
    )
    score.set_defaults(run=_score)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no number from 1")
    return int(text)


def _reason(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text.strip()


def _confidence(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.5 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.5 and 1")
    return value


def _predict(args: argparse.Namespace) -> int:
    sources = _sources(args.images)
    model = args.model or project_root() / "models" / "model.tflite"
    predictions = predict_images(
        load_predictors(model, len(sources)),
        sources,
        threshold=args.threshold,
        abstain_below=args.abstain_below,
    )
    failed = 0
    if args.csv:
        # A name whose bytes are no text is written as it is.
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        print(_csv_line(field.name for field in fields(Prediction)))
    with tqdm(
        total=len(sources),
        unit="image",
        leave=False,
        disable=len(sources) < BAR_FROM or not sys.stderr.isatty(),
    ) as bar:
        for prediction in predictions:
            failed += prediction.error is not None
            bar.update()
            if args.json:
                line = json.dumps(asdict(prediction))
            elif args.csv:
                line = _csv_line(astuple(prediction))
            else:
                line = _text(prediction)
            # Through the bar, which may share the terminal.
            plain_error = prediction.error is not None and not (args.json or args.csv)
            bar.write(line, file=sys.stderr if plain_error else sys.stdout)
    return int(failed > 0)


def _gate(args: argparse.Namespace) -> int:
    from facegender.gate.compare import judge_work_tree
    from facegender.gate.run import print_verdict
    from facegender.gate.verdict import Report
    from facegender.params import load_params

    def judge() -> Report:
        root = project_root()
        return judge_work_tree(
            root,
            load_params(root / "params.yaml"),
            args.baseline,
            accept_data_change=args.accept_data_change,
            accept_rule_change=args.accept_rule_change,
            require_evidence=args.require_evidence,
        )

    return print_verdict(judge, args.format)


def _report(args: argparse.Namespace) -> int:
    # Here, for they take seconds that `predict` need not wait for.
    from facegender.files import file_sha256
    from facegender.gate.compare import commit_of, judge_work_tree
    from facegender.params import load_params
    from facegender.report.page import Provenance, Sources, code_digest, render_page
    from facegender.tracking import connection, log, runs

    root = project_root()
    output = args.output or root / "report.html"
    if not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent} for the page.")
    paths = pipeline_paths((root / "dvc.yaml").read_text())
    sources = Sources(**{source.name: root / paths[source.name] for source in fields(Sources)})
    params = load_params(root / "params.yaml")
    gate = judge_work_tree(root, params, args.baseline, accept_data_change=True)
    if args.baseline and gate.baseline is None:
        raise UserError(" ".join(gate.undecided))
    page = render_page(
        sources,
        params,
        Provenance(
            code=code_digest(root, ["facegender", "stages"]),
            lock=file_sha256(root / "requirements.lock"),
            versions=log.package_versions(),
            commit=commit_of(root),
        ),
        gate,
    )
    output.write_text(page, encoding="utf-8", newline="\n")
    run = root / paths["evaluation_run"]
    logged = "not logged: the models are not in this clone"
    if run.is_file():
        connection.connect(root, tracking_uri())
        loss = json.loads(sources.test_metrics.read_text())["loss"]
        logged = log.log_report(runs.read_run_id(run), [output], loss=loss, folder=None)
    print(f"{output}: {gate.verdict}, beside {gate.baseline or 'no baseline'}; {logged}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from facegender.runtime.sweep import read_grid, run_sweep
    from facegender.tracking import connection

    root, environment = project_root(), dict(os.environ)
    if args.jobs < 1:
        raise UserError("--jobs must be 1 or more.")
    grid = read_grid(args.grid or root / "conf" / "sweep.yaml")
    name = args.name or f"sweep-{secrets.token_hex(3)}"
    connection.connect(root, tracking_uri())
    failed = run_sweep(root, grid, name=name, jobs=args.jobs, environment=environment)
    return int(failed > 0)


def _worker(args: argparse.Namespace) -> int:
    from facegender.runtime.output_capture import hide_native_notes
    from facegender.training.rendezvous import read_worker_group

    cluster = read_worker_group(os.environ.get("TF_CONFIG"))
    if cluster.index == 0:
        raise UserError("This is worker 0 of TF_CONFIG, where `dvc repro` is to be run.")
    root = project_root()
    paths = pipeline_paths((root / "dvc.yaml").read_text(encoding="utf-8"))

    with hide_native_notes():
        from facegender.training.worker import run_worker

    epochs = run_worker(cluster, args.processed or root / paths["processed"], args.wait)
    print(f"helped to train {epochs} epochs; worker 0 has the results")
    return 0


def _relocate(_: argparse.Namespace) -> int:
    from facegender.tracking import connection

    moved = connection.connect(project_root(), tracking_uri())
    print(f"{moved} addresses rewritten" if moved else "nothing to do: the addresses are right")
    return 0


def _verify(args: argparse.Namespace) -> int:
    # DVC, which takes half a second.
    from facegender.runtime.integrity import unverified_remotes, verify

    root = project_root()
    files, damaged = verify(root, args.remote)
    for item in damaged:
        print(f"{escape_controls(item.path)}: damaged {item.location} (object {item.name})")
    for name in unverified_remotes(root):
        print(
            f"warning: DVC takes what the remote {name} sends at its word. `dvc remote modify "
            f"{name} verify true` has it look.",
            file=sys.stderr,
        )
    if damaged:
        raise UserError(
            "What is named above is not what dvc.lock records. `dvc repro` makes it again, or `dvc "
            "pull` fetches it from a remote that is whole; `dvc push` then mends a remote."
        )
    print(f"{files} files and directories are what dvc.lock records")
    return 0


def _text(prediction: Prediction) -> str:
    image = escape_controls(prediction.image)
    if prediction.error is not None:
        return f"{image}: {escape_controls(prediction.error)}"
    return f"{prediction.label:<6}  P(male) = {prediction.probability:.4f}  {image}"


def _csv_line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    # Within values it quotes what its lines end in, and nothing else that would end a line.
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n")


def _promote(args: argparse.Namespace) -> int:
    if args.force != (args.reason is not None):
        args.parser.error("--force and --reason need each other")
    with _registry() as (registry, lock):
        from facegender.gate.compare import judge_folders, may_be_champion
        from facegender.gate.verdict import as_markdown
        from facegender.params import load_params

        params = load_params(project_root() / "params.yaml")

        def judge(candidate: Path, champion: Path | None) -> Any:
            report = judge_folders(candidate, champion, params)
            return registry.Verdict(may_be_champion(report), as_markdown(report))

        run = registry.find_run(args.mlflow_run)
        done = registry.promote(run, judge, lock=lock, force_reason=args.reason)
    name = f"version {done.version} (run {run.info.run_id[:12]}, {run.info.run_name})"
    if done.verdict is None:
        print(f"{name} is the champion already")
        return 0
    print(done.verdict.report)
    before = f"version {done.former} stays the champion" if done.former else "there is no champion"
    if not done.champion:
        raise UserError(
            f"{name} does not pass: {before}. To promote it all the same, say why: `facegender "
            f"promote {args.mlflow_run} --force --reason TEXT`."
        )
    how = "passes and" if done.verdict.passed else "does not pass, but by force"
    after = f", after version {done.former}, which `facegender rollback` puts back"
    print(f"{name} {how} is the champion now{after if done.former else ''}")
    return 0


def _score(args: argparse.Namespace) -> int:
    # Pandas, MLflow and Spark, which predicting does without.
    from facegender.batch_scoring import plan as scoring
    from facegender.batch_scoring.storage import explained

    # Spark says that pandas 3 is new to it; the tests say that what is used here works.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
    scoring.check_spark()
    # Spark's workers are to have what this process has.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        with _registry() as (registry, _):
            import mlflow

            model = registry.pin_version(args.model)
            local = mlflow.artifacts.download_artifacts(artifact_uri=model, dst_path=folder)
        with explained():
            job = scoring.prepare(
                args.input,
                args.output,
                model=model,
                abstain_below=args.abstain_below,
                part_images=args.part_images,
            )
            done = scoring.score(
                job,
                args.input,
                args.output,
                model=Path(local),
                master=args.master,
                conf=dict(args.conf),
            )
    before = f", {done.images - done.now:,} of them from before" if done.now < done.images else ""
    failed = f"; {done.failed:,} could not be read: column error" if done.failed else ""
    print(f"{args.output}: {done.images:,} images{before}, by {model}{failed}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    with _registry() as (registry, lock):
        before, now = registry.rollback(lock=lock)
    print(f"version {now} is the champion again, version {before} no longer")
    return 0


def _models(args: argparse.Namespace) -> int:
    with _registry() as (registry, _):
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
        print("no model is registered: `facegender promote RUN` does it", file=sys.stderr)
    return 0


@contextmanager
def _registry() -> Iterator[tuple[ModuleType, Path]]:
    """Give the registry, connected, and the place of its lock; MLflow's errors become UserError."""
    # MLflow takes seconds to import, and predicting needs none of it.
    from mlflow.exceptions import MlflowException

    from facegender.tracking import connection, registry

    root = project_root()
    try:
        connection.connect(root, tracking_uri(), required=True)
        yield registry, root / ".dvc" / "tmp" / "registry.lock"
    except MlflowException as error:
        if connection.is_refusal(error):
            raise UserError(f"The MLflow server refuses you: {connection.CHECK_LOGIN}.") from None
        reason = without_credentials(str(error), secrets_of(os.environ))
        raise UserError(
            f"MLflow does not do it: {reason}. `facegender models` shows how things stand."
        ) from None


def _sources(arguments: list[str]) -> list[tuple[str, bytes | Path]]:
    sources: list[tuple[str, bytes | Path]] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            content = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
            if len(content) > MAX_STDIN_BYTES:
                raise UserError(f"Standard input has more than {MAX_STDIN_BYTES:,} bytes.")
            sources.append(("-", content))
        elif path.is_dir():
            found = find_images(path)
            if not found:
                raise UserError(f"There is no image in the folder {argument}.")
            sources += [(str(path / image), path / image) for image in found]
        elif path.exists():
            sources.append((argument, path))
        else:
            raise UserError(f"There is no file or folder {argument}.")
    return sources
