"""The report page and the model card, rendered from the pipeline's results.

Both depend only on their inputs, not on time, folder, speed or the id of a run.
"""

import base64
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from facegender.data.manifest import SPLITS, read_manifest
from facegender.errors import UserError
from facegender.evaluation.groups import find_groups
from facegender.evaluation.label_audit import worst_labels
from facegender.evaluation.metrics import shown_metrics, wilson_interval
from facegender.evaluation.plots import most_confident_errors
from facegender.faces.settings import crop_of
from facegender.files import file_sha256
from facegender.gate.verdict import MAX_FLIPS, Report
from facegender.labels import LABELS, NAMES
from facegender.params import Params, flatten

WORST_ERRORS = 10


@dataclass(frozen=True)
class Sources:
    """Paths of the pipeline's results, under the names of dvc.yaml.

    All but the test metrics may be missing (the models are, in a clone without DVC's cache); the
    page then says so.
    """

    raw_info: Path
    splits: Path
    data_metrics: Path
    data_plots: Path
    label_issues: Path
    label_plots: Path
    history: Path
    test_metrics: Path
    predictions: Path
    robustness: Path
    test_plots: Path
    export_metrics: Path
    model: Path
    float32: Path
    int8: Path


@dataclass(frozen=True)
class Provenance:
    """Provenance of the results, besides data and parameters.

    Attributes:
        code: result of `code_digest`.
        lock: SHA-256 of requirements.lock.
        commit: commit of the repository; None in a committed page, which cannot contain the
            commit that it is part of.
    """

    code: str
    lock: str
    versions: Mapping[str, str]
    commit: str | None = None


def render_page(
    sources: Sources, params: Params, provenance: Provenance, gate: Report | None = None
) -> str:
    """Return the page: one HTML document without scripts, other files or network access.

    Args:
        gate: comparison with another commit, shown in a section of its own.

    Raises:
        UserError: the test metrics are missing.
    """
    facts = _facts(sources, params)
    names = ("loss", "accuracy", "roc", "precision_recall", "reliability", "faces", "errors")
    pictures = {name: _picture(sources.test_plots / f"{name}.png") for name in names}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            **facts,
            pictures=pictures,
            class_pictures={
                split: _picture(sources.data_plots / f"class_distribution_{split}.png")
                for split in SPLITS
            },
            issue_picture=_picture(sources.label_plots / "issues.png"),
            parameters=_by_group(params),
            reliability=_rows(sources.test_plots / "reliability.csv"),
            worst=_worst(sources.predictions, params.evaluate.threshold),
            files=_digests(sources),
            provenance=provenance,
            # Without the patch level, which is not pinned.
            versions={"python": "{}.{}".format(*sys.version_info), **provenance.versions},
            gate=gate,
            max_flips=MAX_FLIPS,
        )
    )


def render_card(sources: Sources, params: Params) -> str:
    """Return the model card, in Markdown.

    Mitchell et al., Model Cards for Model Reporting, FAT* 2019.

    Raises:
        UserError: the test metrics are missing.
    """
    return _environment().get_template("model-card.md.j2").render(**_facts(sources, params))


def code_digest(root: Path, folders: Iterable[str]) -> str:
    """Return one SHA-256 of all files in folders of code.

    In a clean clone it equals `git ls-files FOLDERS | xargs sha256sum | sha256sum`.
    """
    files = sorted(
        path.relative_to(root).as_posix()
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    lines = "".join(f"{file_sha256(root / name)}  {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _environment() -> Environment:
    # Always escape: paths and groups are text from other people's files.
    environment = Environment(
        loader=PackageLoader("facegender.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "cell": _cell, "yaml": _yaml}
    return environment


def _facts(sources: Sources, params: Params) -> dict[str, Any]:
    metrics = _json(sources.test_metrics)
    if metrics is None:
        raise UserError(
            f"{sources.test_metrics.name} is missing: run `make repro` first, which evaluates the "
            "model on the test split."
        )
    groups = _groups(sources.test_plots / "groups.csv", metrics["accuracy"])
    data = _json(sources.data_metrics)
    return {
        "metrics": metrics,
        "figures": _figures(metrics),
        "labels": list(LABELS),
        "raw": _json(sources.raw_info),
        "data": data,
        "dropped": None if data is None else _dropped(data),
        "metadata_notes": [] if data is None else _metadata_notes(data),
        "how_cut": _how_cut(params),
        "audit": _audit(sources),
        "kept": _kept_epoch(sources.history),
        "groups": groups,
        "robustness": _rows(sources.robustness),
        "left_out": _left_out(sources.predictions, params) if groups else [],
        "export": _json(sources.export_metrics),
        "params": params,
    }


def _figures(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per metric, with its 95 % interval if it has one."""
    cells = metrics["confusion"]
    shares = {
        f"recall_{label}": (
            cells[f"{label}_as_{label}"],
            sum(cells[f"{label}_as_{guess}"] for guess in LABELS),
        )
        for label in LABELS
    }
    called_male = sum(cells[f"{label}_as_male"] for label in LABELS)
    shares["precision"] = (cells["male_as_male"], called_male)
    rows = []
    for metric in shown_metrics():
        low, high = None, None
        if interval := metrics.get(f"{metric.name}_ci"):
            low, high = interval["low"], interval["high"]
        elif metric.name in shares and shares[metric.name][1]:
            low, high = wilson_interval(*shares[metric.name])
        value = metrics[metric.name]
        rows.append({"metric": metric, "value": value, "low": low, "high": high})
    return rows


def _dropped(data: Mapping[str, Any]) -> str:
    """Return how many images, and other items of the source, are in no split, by reason."""
    counts = {
        "not read from the source": len(data["left_out"]),
        "neither images nor CSVs": sum(kind["count"] for kind in data["other_files"].values()),
        "excluded by data.exclude": data["excluded"]["count"],
        "without a label": data["unlabelled"]["count"],
        "to be ignored": data["ignored"],
        "unreadable": data["invalid"]["count"],
    } | {
        name.replace("_", " "): check["count"]
        for name, check in data["checks"].items()
        if check["policy"] == "drop"
    }
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if count) or "none"


def _metadata_notes(data: Mapping[str, Any]) -> list[str]:
    """Return what the metadata say that was not used, one sentence each."""
    found = data["metadata"]
    notes = [f"{table} was skipped: {why}" for table, why in found["skipped_tables"].items()]
    for kind, count, words in (
        ("unmatched_rows", "unmatched", "match no image"),
        ("ambiguous_rows", "ambiguous", "fit several images"),
    ):
        notes += [
            f"{table}: {row[count]} of {row['rows']} rows {words}, such as {row['first']!r}"
            for table, row in found[kind].items()
        ]
    notes += [
        f"{column} contradicts the label of {told['images']} images, such as {told['first']!r}"
        for column, told in found.get("other_labels", {}).items()
    ]
    return notes


def _kept_epoch(path: Path) -> dict[str, Any] | None:
    """Return the epoch whose weights are the model, and the number of epochs."""
    if not path.is_file():
        return None
    history = pd.read_csv(path)
    kept = history[history["kept"] == 1]
    if kept.empty:
        return None
    row = kept.iloc[0]
    return {
        "epochs": len(history),
        "epoch": int(row["epoch"]),
        "val_loss": row["val_loss"],
        "val_accuracy": row["val_accuracy"],
    }


def _groups(path: Path, accuracy: float) -> list[dict[str, Any]] | None:
    """Return the metadata columns with one row per group; None if the table is missing."""
    if not path.is_file():
        return None
    table = pd.read_csv(
        path,
        dtype={"column": str, "group": str},
        keep_default_na=False,
        na_values=[""],
        # As `read_manifest`: a carriage return in a group's name does not end the row.
        lineterminator="\n",
    )
    table["below"] = ~table["small"] & (table["accuracy_high"] < accuracy)
    return [
        {"column": column, "rows": _records(rows)}
        for column, rows in table.groupby("column", sort=False)
    ]


def _left_out(path: Path, params: Params) -> Sequence[str]:
    """Return the images and columns outside all groups, one sentence each."""
    if not path.is_file():
        return []
    chosen, minimum = params.evaluate.groups, params.evaluate.min_group_size
    return find_groups(read_manifest(path), chosen, minimum).left_out


def _how_cut(params: Params) -> str:
    """Return how a picture becomes the model's input, as one clause."""
    crop = crop_of(params.image)
    if crop is None:
        return "each picture is taken whole; no face is looked for (image.face: none)"
    turned = "turned until the eyes are level" if crop.align else "not turned"
    boxes = params.image.crop.boxes
    given = (
        f"boxes come from {boxes.file} and, where it has none, from a detector; " if boxes else ""
    )
    return (
        f"the largest face is cut out, a square wider by {crop.margin:g} than its box, {turned}; "
        f"{given}a face has a score of at least {crop.min_score:g} and {crop.min_size} pixels. "
        "A picture without a face, or filled by one, is taken whole (image.face: crop)"
    )


def _audit(sources: Sources) -> dict[str, Any] | None:
    """Return the summary of the label audit, with `worst`, the labels of its picture."""
    summary = _json(sources.label_plots / "summary.json")
    if summary is None or not sources.label_issues.is_file():
        return None
    worst = worst_labels(read_manifest(sources.label_issues))
    return summary | {"worst": _records(worst.assign(label=worst["label"].map(NAMES)))}


def _worst(path: Path, threshold: float) -> list[dict[str, Any]] | None:
    """Return the most confident errors, in the order of the picture's faces."""
    if not path.is_file():
        return None
    predictions = read_manifest(path)
    indices = most_confident_errors(
        predictions["label"].to_numpy(dtype=int),
        predictions["probability"].to_numpy(dtype=float),
        threshold=threshold,
        count=WORST_ERRORS,
    )
    worst = predictions.iloc[indices][["path", "label", "predicted", "probability"]]
    for column in ("label", "predicted"):
        worst[column] = worst[column].map(NAMES)
    return _records(worst)


def _by_group(params: Params) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flatten(params).items():
        group, _, last = name.rpartition(".")
        groups.setdefault(group, {})[last] = value
    return groups


def _digests(sources: Sources) -> list[tuple[str, str | None]]:
    named = [
        *((f"manifest of {split}", sources.splits / f"{split}.csv") for split in SPLITS),
        ("model, Keras", sources.model),
        ("model, LiteRT float32", sources.float32),
        ("model, LiteRT int8", sources.int8),
        ("predictions of the test split", sources.predictions),
    ]
    return [(name, file_sha256(path) if path.is_file() else None) for name, path in named]


def _picture(path: Path) -> dict[str, Any] | None:
    """Return a PNG as a data URI, and its size in pixels."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        width, height = image.size
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"src": f"data:image/png;base64,{content}", "width": width, "height": height}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _rows(path: Path) -> list[dict[str, Any]] | None:
    return _records(pd.read_csv(path)) if path.is_file() else None


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _number(value: float | None, digits: int = 4) -> str:
    if value == math.inf:
        return "\N{INFINITY}"
    return "\N{EN DASH}" if pd.isna(value) else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 4) -> str:
    if pd.isna(value) or value == 0:
        return _number(value, digits)
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _yaml(value: object) -> str:
    """Return a parameter as params.yaml spells it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(value: object) -> str:
    """Return text that stays in one cell of a Markdown table; autoescape handles HTML."""
    text = " ".join(str(value).split())
    return "".join(f"\\{letter}" if letter in "\\`*[]|" else letter for letter in text)
