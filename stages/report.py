"""Stage 7: write the report page and the model card."""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from facegender.files import file_sha256
from facegender.params import load_params
from facegender.report.page import Provenance, Sources, code_digest, render_card, render_page
from facegender.runtime.dvc_context import project_root, tracking_uri
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    for source in fields(Sources):
        parser.add_argument(
            f"--{source.name.replace('_', '-')}",
            type=Path,
            required=True,
            help=f"`{source.name}` of dvc.yaml",
        )
    parser.add_argument(
        "--evaluation-run", type=Path, required=True, help="file with the id of the MLflow run"
    )
    parser.add_argument("--code", nargs="+", required=True, help="directories of code")
    parser.add_argument("--lock", type=Path, required=True, help="lock file of the packages")
    parser.add_argument("--page", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--card", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    params = load_params(args.params)
    sources = Sources(**{source.name: getattr(args, source.name) for source in fields(Sources)})

    # Here, so that --help and parameter errors do not wait for MLflow.
    from facegender.tracking import connection, log, runs

    provenance = Provenance(
        code=code_digest(Path(), args.code),
        lock=file_sha256(args.lock),
        versions=log.package_versions(),
    )
    for path, text in (
        (args.page, render_page(sources, params, provenance)),
        (args.card, render_card(sources, params)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")

    connection.connect(project_root(), tracking_uri())
    logged = log.log_report(
        runs.read_run_id(args.evaluation_run),
        [args.page, args.card, sources.label_issues],
        loss=json.loads(sources.test_metrics.read_text())["loss"],
        folder="metrics",
    )
    print(f"{args.page}: {args.page.stat().st_size / 1e6:.2f} MB; {logged}")


if __name__ == "__main__":
    run_stage(main)
