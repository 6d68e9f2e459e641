"""`facegender report`."""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from facegender.errors import UserError
from facegender.runtime.dvc_context import pipeline_paths, project_root, tracking_uri


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Write the page of metrics/report.html, with the gate's comparison with another commit. "
        "It shows the results in metrics/ as they are; `make report` updates them first. The page "
        "is logged to the MLflow run of the results if this clone has it."
    )
    parser.add_argument(
        "--baseline",
        metavar="REV",
        help="commit to compare with (default: that of `facegender gate`)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="HTML file to write (default: report.html)"
    )
    parser.add_argument(
        "--accept-data-change", action="store_true", help="same as for `facegender gate`"
    )
    parser.add_argument(
        "--accept-rule-change", action="store_true", help="same as for `facegender gate`"
    )
    parser.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    """Write the page, log it, and print where it is."""
    from facegender.files import file_sha256
    from facegender.gate.compare import commit_of, judge_work_tree
    from facegender.params import load_params
    from facegender.report.page import Provenance, Sources, code_digest, render_page
    from facegender.tracking import connection, log, runs

    root = project_root()
    output = args.output or root / "report.html"
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"Cannot write {output}: name a file in a folder that exists.")
    paths = pipeline_paths((root / "dvc.yaml").read_text())
    sources = Sources(**{source.name: root / paths[source.name] for source in fields(Sources)})
    params = load_params(root / "params.yaml")
    # As `facegender gate` judges: a page that accepts more would say pass where the gate does not.
    gate = judge_work_tree(
        root,
        params,
        args.baseline,
        accept_data_change=args.accept_data_change,
        accept_rule_change=args.accept_rule_change,
    )
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
    print(f"{output}: {gate.verdict}, compared with {gate.baseline or 'no baseline'}; {logged}")
    return 0
