"""The committed results of the sample, for tests that need some."""

from dataclasses import fields
from pathlib import Path

from facegender.report.page import Sources
from facegender.runtime.dvc_context import pipeline_paths
from tools.compose_params import ROOT


def committed_sources(root: Path) -> Sources:
    paths = pipeline_paths((ROOT / "dvc.yaml").read_text())
    return Sources(**{source.name: root / paths[source.name] for source in fields(Sources)})
