"""Digests of the pipeline's outputs by stage, to compare one run with another."""

import hashlib
import json
from pathlib import Path

from facegender.data.sources.raw_directory import content_digest
from facegender.files import file_sha256, parse_yaml
from facegender.runtime.dvc_context import pipeline_paths

# Names in dvc.yaml of ids of MLflow runs, and of times.
VARYING = frozenset({"run", "evaluation_run", "speed"})
LATENCIES = "export_metrics"


def output_digests(clone: Path) -> dict[str, dict[str, str]]:
    """Return a SHA-256 of each output of each stage of a clone in which the pipeline has run.

    The digests are of the files themselves, because dvc.lock may describe others. They exclude
    files of MLflow run ids and of times, and the latencies of the export.
    """
    paths = pipeline_paths((clone / "dvc.yaml").read_text())
    varying = {paths[name] for name in VARYING}
    lock = parse_yaml((clone / "dvc.lock").read_text())
    digests: dict[str, dict[str, str]] = {}
    for stage, entry in lock["stages"].items():
        digests[stage] = {
            out["path"]: _digest(clone / out["path"], out["path"] == paths[LATENCIES])
            for out in entry.get("outs", [])
            if out["path"] not in varying
        }
    return digests


def _digest(path: Path, has_latencies: bool) -> str:
    if not path.exists():
        return "absent"
    if path.is_dir():
        return content_digest(path)[1]
    if has_latencies:
        content = json.loads(path.read_text())
        for kind in ("float32", "int8"):
            del content[kind]["latency_ms"]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return file_sha256(path)


def differences(one: dict[str, dict[str, str]], two: dict[str, dict[str, str]]) -> list[str]:
    """Return `stage: path` of each output that differs, first stages first."""
    order = [*one, *(stage for stage in two if stage not in one)]
    return [
        f"{stage}: {path}"
        for stage in order
        for path in sorted(one.get(stage, {}).keys() | two.get(stage, {}).keys())
        if one.get(stage, {}).get(path) != two.get(stage, {}).get(path)
    ]
