import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import binomtest

from facegender.data.manifest import write_table
from facegender.errors import UserError
from facegender.evaluation.groups import NO_METADATA, group_metrics
from facegender.evaluation.label_audit import COLUMNS
from facegender.evaluation.metrics import classification_metrics, shown_metrics
from facegender.gate.evidence import Evidence
from facegender.gate.verdict import Comparison, Report
from facegender.params import Boxes, Params
from facegender.report.page import (
    WORST_ERRORS,
    Provenance,
    Sources,
    code_digest,
    render_card,
    render_page,
)
from facegender.runtime.git import checked_git
from tests.conftest import fill, init_repository, run_command
from tests.results import committed_sources
from tools.compose_params import ROOT

HOSTILE = "<script>alert(1)</script>|[x](javascript:y)`\"'&\n# {{ 7 * 7 }}"
PROVENANCE = Provenance(code="c" * 64, lock="d" * 64, versions={"numpy": "2.0"})


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the texts in it."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "ellipse"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All texts, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A copy of the committed results, to change."""
    shutil.copytree(ROOT / "metrics", tmp_path / "metrics")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "raw.json", tmp_path / "data")
    return committed_sources(tmp_path)


@pytest.fixture(scope="module")
def committed_page(params: Params) -> str:
    return render_page(committed_sources(ROOT), params, PROVENANCE)


@pytest.fixture(scope="module")
def elements(committed_page: str) -> Elements:
    return Elements(committed_page)


def test_it_needs_nothing_from_elsewhere(committed_page: str, elements: Elements) -> None:
    for tag, attributes in elements.found:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "audio", "video"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,", "data:,"))
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", committed_page)
    assert [bad for bad in ("//", "url(", "@import", "javascript:") if bad in rest] == []
    assert len(committed_page) < 3_000_000


def test_it_can_be_read_by_everyone(elements: Elements) -> None:
    assert elements.open == []
    assert elements.all("html")[0]["lang"] == "en"
    assert [image for image in elements.all("img") if not image.get("alt")] == []
    assert len(elements.all("img")) == 10
    assert len(elements.all("caption")) == len(elements.all("table")) >= 8
    assert {cell.get("scope") for cell in elements.all("th")} <= {"row", "col", "rowgroup"}
    headings = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert max(np.diff(headings)) <= 1
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in elements.all("a")} <= set(ids)
    assert {part["aria-labelledby"] for part in elements.all("section")} <= set(ids)


def test_its_figures_are_those_of_the_files(elements: Elements) -> None:
    metrics = json.loads((ROOT / "metrics/test.json").read_text())
    text = elements.text
    for metric in shown_metrics():
        assert f"{metric.title} {metrics[metric.name]:.4f}" in text
    for name in ("accuracy_ci", "f1_ci"):
        assert f"{metrics[name]['low']:.4f} to {metrics[name]['high']:.4f}" in text
    cells = metrics["confusion"]
    interval = binomtest(
        cells["female_as_female"], cells["female_as_female"] + cells["female_as_male"]
    ).proportion_ci(method="wilson")
    assert f"{interval.low:.4f} to {interval.high:.4f}" in text
    raw = json.loads((ROOT / "data/raw.json").read_text())
    assert raw["sha256"] in text


def test_names_from_the_data_stay_text(sources: Sources, params: Params) -> None:
    predictions = pd.read_csv(sources.predictions)
    wrong = predictions["label"] != predictions["predicted"]
    predictions.loc[wrong, "path"] = HOSTILE
    predictions.to_csv(sources.predictions, index=False)
    groups = pd.read_csv(sources.test_plots / "groups.csv", keep_default_na=False)
    groups.loc[0, ["column", "group"]] = HOSTILE
    groups.to_csv(sources.test_plots / "groups.csv", index=False)
    raw = json.loads(sources.raw_info.read_text()) | {"version": HOSTILE, "slug": HOSTILE}
    sources.raw_info.write_text(json.dumps(raw))
    flips = pd.DataFrame(
        [[HOSTILE, "female", 0.1, 0.9, False]],
        columns=["path", "label", "old_probability", "new_probability", "right"],
    )
    gate = Report(
        candidate="the work tree",
        baseline=HOSTILE,
        floors=[],
        comparisons=[Comparison("accuracy", 360, 0.5, 0.6, 0.1)],
        groups=[Comparison(HOSTILE, 40, 0.5, 0.6, 0.1)],
        left_out=[HOSTILE],
        flips=flips,
        notes=[HOSTILE],
    )
    page = render_page(sources, params, PROVENANCE, gate)
    elements = Elements(page)
    assert elements.all("script") == []
    # Errors, column, group, version, slug, baseline, group, left out, flip, note: all told.
    assert "".join(elements.texts).count(HOSTILE) == min(int(wrong.sum()), WORST_ERRORS) + 9

    card = render_card(sources, params)
    assert "<script" not in card
    assert "[x](javascript" not in card
    rows = [line for line in card.splitlines() if "alert(1)" in line and line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [10, 7]


def test_a_carriage_return_in_a_name_does_not_end_its_row(sources: Sources, params: Params) -> None:
    table = pd.DataFrame({"label": [0, 1], "probability": 0.1, "hair": ["long\rblond", "short"]})
    groups = group_metrics(table, threshold=0.5, minimum=1)
    write_table(groups, sources.test_plots / "groups.csv")
    assert "| hair: long blond | 1 | 1.000 |" in render_card(sources, params)


def test_what_is_missing_is_said(sources: Sources, params: Params) -> None:
    for path in (sources.test_plots, sources.data_plots):
        shutil.rmtree(path)
    for path in (
        sources.raw_info,
        sources.data_metrics,
        sources.history,
        sources.predictions,
        sources.robustness,
        sources.label_issues,
        sources.export_metrics,
    ):
        path.unlink(missing_ok=True)
    elements = Elements(render_page(sources, params, PROVENANCE))
    text = elements.text
    assert elements.all("img") == []
    for what in (
        "table of groups",
        "list of predictions",
        "table of robustness",
        "label audit",
        "export",
        "description of the data",
    ):
        assert f"No {what} here" in text
    assert text.count("No picture here") == 10
    assert "not in this clone" in text
    accuracy = json.loads(sources.test_metrics.read_text())["accuracy"]
    assert f"{accuracy:.4f}" in render_card(sources, params)
    sources.test_metrics.unlink()
    with pytest.raises(UserError, match="make repro"):
        render_page(sources, params, PROVENANCE)


def test_one_class_no_error_and_no_groups(sources: Sources, params: Params) -> None:
    labels, probabilities = np.zeros(5, dtype=int), np.full(5, 0.1)
    metrics = classification_metrics(labels, probabilities, threshold=0.5)
    sources.test_metrics.write_text(json.dumps(metrics))
    table = pd.DataFrame({"path": list("abcde"), "label": labels, "probability": probabilities})
    table.assign(predicted=0).to_csv(sources.predictions, index=False)
    groups = group_metrics(table.drop(columns="path"), threshold=0.5, minimum=2)
    groups.to_csv(sources.test_plots / "groups.csv", index=False)
    text = Elements(render_page(sources, params, PROVENANCE)).text
    assert "The test split has no errors" in text
    assert "The metadata define no groups" in text
    assert "nan" not in text.lower().split()
    assert "None" not in text
    card = render_card(sources, params)
    assert "| Recall, male | – | – |" in card  # noqa: RUF001
    assert "None: a CSV next to the images" in card


def test_small_and_low_groups_are_marked(sources: Sources, params: Params) -> None:
    generator = np.random.default_rng(0)
    table = pd.DataFrame(
        {"label": generator.integers(0, 2, 200), "age": ["young"] * 150 + ["old"] * 50}
    )
    table.loc[:4, "age"] = "middle"
    sure = np.where(table["age"] == "old", 0.2, 0.95)
    table["probability"] = np.where(table["label"] == 1, sure, 1 - sure)
    groups = group_metrics(table, threshold=0.5, minimum=20)
    groups.to_csv(sources.test_plots / "groups.csv", index=False)
    rows = [line for line in render_card(sources, params).splitlines() if "| age: " in line]
    marks = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows[:3]}
    assert marks == {"age: middle": "small", "age: old": "below", "age: young": ""}
    # The recall of a class has an interval of its own.
    row = groups.set_index("group").loc["young"]
    of_class = int(((table["age"] == "young") & (table["label"] == 1)).sum())
    interval = binomtest(of_class, of_class).proportion_ci(method="wilson")
    assert (row["recall_male_low"], row["recall_male_high"]) == (interval.low, interval.high)
    # The second table compares each group with the images outside it.
    old = groups.set_index("group").loc["old"]
    assert old["difference"] < -0.3
    cells = [cell.strip().replace("\N{MINUS SIGN}", "-") for row in rows for cell in row.split("|")]
    interval = f"{old['difference_low']:+.3f} to {old['difference_high']:+.3f}"
    ratio = f"{old['error_ratio']:.2f}" if np.isfinite(old["error_ratio"]) else "\N{EN DASH}"
    at = cells.index(f"{old['difference']:+.3f}")
    assert cells[at + 1 : at + 3] == [interval, ratio]
    assert cells[at + 4] == f"{old['p']:.3f}"
    page = Elements(render_page(sources, params, PROVENANCE)).text
    assert f"{interval} {ratio}" in page.replace("\N{MINUS SIGN}", "-")
    assert "1 has fewer than 20 images" in page
    assert "old below 50 0.000" in page


def test_the_validation_accuracy_of_training_is_not_that_of_the_export(
    sources: Sources, params: Params
) -> None:
    history = pd.read_csv(sources.history).assign(val_accuracy=0.75, val_loss=0.5)
    history.to_csv(sources.history, index=False)

    def told(**changed: object) -> str:
        train = params.train.model_copy(update=changed)
        page = render_page(sources, params.model_copy(update={"train": train}), PROVENANCE)
        return Elements(page).text

    accuracy = "validation loss 0.5000, accuracy 0.7500"
    best = "which had the lowest validation loss"
    assert f"{best}: {accuracy} (before calibration, with a threshold of 0.5)." in told()
    assert f"{accuracy} (with a threshold of 0.5)." in told(calibrate=False)
    # The epochs of the head are not compared.
    assert f"{best} of fine-tuning: {accuracy}" in told(head_epochs=2)


def test_speed_makes_no_difference(sources: Sources, params: Params) -> None:
    before = render_page(sources, params, PROVENANCE), render_card(sources, params)
    assert before == (render_page(sources, params, PROVENANCE), render_card(sources, params))
    export = json.loads(sources.export_metrics.read_text())
    for kind in ("float32", "int8"):
        export[kind]["latency_ms"] *= 2
    sources.export_metrics.write_text(json.dumps(export))
    assert before == (render_page(sources, params, PROVENANCE), render_card(sources, params))
    export["int8"]["accuracy"] -= 0.1
    sources.export_metrics.write_text(json.dumps(export))
    assert before[0] != render_page(sources, params, PROVENANCE)


def test_every_parameter_is_on_the_page_and_in_the_stage(
    params: Params, elements: Elements
) -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]
    assert set(stage["params"]) == set(params.model_dump())
    text = elements.text
    assert f"train seed {params.train.seed} batch_size {params.train.batch_size} " in text
    assert "train.augmentation zoom 0.1 " in text
    assert "weights_sha256 null" in text


def test_the_digest_of_the_code_is_what_the_page_says(tmp_path: Path) -> None:
    code = ("stages/a.py", "facegender/b.py", "facegender/_d.py")
    fill(tmp_path, {name: name for name in (*code, "facegender/report/templates/c.j2")})
    init_repository(tmp_path)
    checked_git(tmp_path, "add", "--all")
    digest = code_digest(tmp_path, ["facegender", "stages"])
    (tmp_path / "facegender" / "__pycache__").mkdir()
    (tmp_path / "facegender" / "__pycache__" / "b.pyc").write_bytes(b"?")
    assert code_digest(tmp_path, ["facegender", "stages"]) == digest
    command = "git ls-files facegender stages | xargs sha256sum | sha256sum"
    printed = run_command("bash", "-c", command, cwd=tmp_path).stdout
    assert printed.split()[0] == digest
    (tmp_path / "stages" / "a.py").write_text("other")
    assert code_digest(tmp_path, ["facegender", "stages"]) != digest


def test_the_committed_card_is_the_one_of_the_committed_results(params: Params) -> None:
    card = (ROOT / "docs" / "model-card.md").read_text()
    assert card == render_card(committed_sources(ROOT), params), (
        "docs/model-card.md is not that of metrics/ and params.yaml: run `make repro`"
    )
    # Read as a reader does, not by the template's code.
    metrics = json.loads((ROOT / "metrics" / "test.json").read_text())
    for name, title in ((metric.name, metric.title) for metric in shown_metrics()):
        (row,) = re.findall(rf"^\| {re.escape(title)} \| ([0-9.]+) \| (.+?) \|", card, re.M)
        assert row[0] == f"{metrics[name]:.4f}"
        if f"{name}_ci" in metrics:
            assert row[1] == "{low:.4f} to {high:.4f}".format(**metrics[f"{name}_ci"])
    for label in ("female", "male"):
        (counts,) = re.findall(rf"^\| labelled {label} \| (\d+) \| (\d+) \|", card, re.M)
        assert counts == tuple(
            str(metrics["confusion"][f"{label}_as_{guess}"]) for guess in ("female", "male")
        )
    assert f"On the {metrics['n']} test images" in card
    groups = pd.read_csv(ROOT / "metrics/test/groups.csv", keep_default_na=False)
    for row in groups.itertuples():
        assert f"| {row.column}: {row.group} | {row.n} | {row.accuracy:.3f} | " in card


def test_what_belongs_to_no_group_is_said(sources: Sources, params: Params) -> None:
    predictions = pd.read_csv(sources.predictions)
    column = next(name for name in predictions.columns if name not in NO_METADATA)
    predictions.loc[:4, column] = None
    predictions.to_csv(sources.predictions, index=False)
    evaluate = params.evaluate.model_copy(update={"groups": [column]})
    params = params.model_copy(update={"evaluate": evaluate})
    missing = int(predictions[column].isna().sum())
    for text in (render_page(sources, params, PROVENANCE), render_card(sources, params)):
        (line,) = re.findall("Not in groups: .*", text)
        assert "not in evaluate.groups: " in line
        assert f"missing for {missing} images" in line


def test_both_comparisons_are_shown(sources: Sources, params: Params) -> None:
    fixed = Report("now", "v1 (abc)", [], comparisons=[Comparison("accuracy", 9, 0.8, 0.6, -0.2)])
    row = Comparison("accuracy", 9, 0.61, 0.6, -0.01)
    gate = Report("now", "main", [], comparisons=[row], reference=fixed)
    text = Elements(render_page(sources, params, PROVENANCE, gate)).text
    assert "The fixed reference, which small drops cannot move, is v1 (abc)" in text
    assert "Metrics of the reference and of these results" in text
    assert "accuracy 9 0.6100 0.6000" in text
    assert "accuracy 9 0.8000 0.6000" in text


def test_the_page_rounds_p_as_the_gate_does(sources: Sources, params: Params) -> None:
    evidence = Evidence(360, 0.0, 0.02, 0.01)
    rows = [
        Comparison("recall_male", 9, 0.9, 0.8, -0.1, -0.15, 0.05, p=0.0478, verdict="fail"),
        Comparison("recall_female", 9, 0.9, 0.8, -0.1, -0.15, 0.05, p=0.0512),
        Comparison("accuracy", 9, 0.9, 0.8, -0.1, -0.2, -0.05, p=0.00146, verdict="fail"),
    ]
    gate = Report("now", "main", [], comparisons=rows, evidence=evidence)
    text = Elements(render_page(sources, params, PROVENANCE, gate)).text
    assert "\N{MINUS SIGN}0.1500 to +0.0500 0.048 fail" in text
    assert "\N{MINUS SIGN}0.1500 to +0.0500 0.051 info" in text
    assert "\N{MINUS SIGN}0.2000 to \N{MINUS SIGN}0.0500 0.0015 fail" in text
    assert "compared image by image. 360 images" in text


def test_robustness_is_on_the_page_and_in_the_card(sources: Sources, params: Params) -> None:
    columns = ["change", "strength", "n", "accuracy"]
    interval = ["difference", "difference_low", "difference_high"]
    rows = [
        ["half_resolution", "half the pixels a side", 360, 0.9, -0.05, -0.08, -0.02],
        ["darker", "0.5 times as bright", 360, 0.94, -0.01, -0.03, 0.01],
    ]
    table = pd.DataFrame(rows, columns=columns + interval)
    table.to_csv(sources.robustness, index=False)
    page = Elements(render_page(sources, params, PROVENANCE))
    assert page.open == []
    text = page.text.replace("\N{MINUS SIGN}", "-")
    marked = "half resolution lower half the pixels a side 0.9000 -0.0500 -0.0800 to -0.0200"
    assert marked in text
    assert "darker 0.5 times as bright 0.9400 -0.0100 -0.0300 to +0.0100" in text
    card = render_card(sources, params).replace("\N{MINUS SIGN}", "-")
    row = "| half resolution | half the pixels a side | 0.9000 | -0.0500 | -0.0800 to -0.0200 |"
    assert row in card


def write_audit(sources: Sources, summary: dict, rows: list[list[object]]) -> None:
    pd.DataFrame(rows, columns=COLUMNS).to_csv(sources.label_issues, index=False)
    sources.label_plots.mkdir(exist_ok=True)
    (sources.label_plots / "summary.json").write_text(json.dumps(summary))
    shutil.copy(sources.test_plots / "faces.png", sources.label_plots / "issues.png")


def test_labels_in_doubt_are_shown_with_what_to_do(sources: Sources, params: Params) -> None:
    rows: list[list[object]] = [
        [f"female/{number}.png", "a" * 64, "test", "label", 0, 0.91, 0.09] for number in range(25)
    ]
    rows[0][0] = HOSTILE
    rows.append(["male/dark.png", "b" * 64, "train", "dark", 1, None, None])
    issues = {"dark": 1, "label": 25, "low_information": 2}
    summary = {"images": 400, "accuracy": 0.95, "not_judged": None, "issues": issues}
    before = len(Elements(render_page(sources, params, PROVENANCE)).all("img"))
    write_audit(sources, summary, rows)
    elements = Elements(render_page(sources, params, PROVENANCE))
    text = elements.text
    assert len(elements.all("img")) == before + 1
    assert HOSTILE in "".join(elements.texts)
    assert "judged each of 400 labels" in text
    assert "agrees with 0.9500 of them and doubts 25" in text
    assert "Pictures that show little: 1 dark, 2 low information." in text
    assert "conf/exclude.txt" in text
    assert "female/19.png test female 0.9100" in text
    assert "female/20.png" not in text
    card = render_card(sources, params)
    assert "- Labels in doubt: 25 of 400 (`metrics/label_issues.csv`)" in card


def test_labels_that_are_not_judged_are_no_silence(sources: Sources, params: Params) -> None:
    why = "model.weights is none"
    summary = {"images": 400, "accuracy": None, "not_judged": why, "issues": {}}
    write_audit(sources, summary, [])
    text = Elements(render_page(sources, params, PROVENANCE)).text
    assert f"The labels are not judged: {why}." in text
    assert "Pictures that show little: none." in text
    assert f"- Labels in doubt: not judged ({why})." in render_card(sources, params)


@pytest.mark.parametrize("face", ["none", "crop"])
def test_how_pictures_are_cut_is_said(sources: Sources, params: Params, face: str) -> None:
    params = params.model_copy(update={"image": params.image.model_copy(update={"face": face})})
    data = json.loads(sources.data_metrics.read_text())
    found = {"policy": "keep", "images": []}
    data["checks"] |= {"no_face": found | {"count": 7}, "several_faces": found | {"count": 5}}
    sources.data_metrics.write_text(json.dumps(data))
    page = Elements(render_page(sources, params, PROVENANCE)).text
    card = " ".join(render_card(sources, params).split())
    for text in (page, card):
        assert ("each picture is taken whole; no face is looked for" in text) == (face == "none")
        assert ("a square wider by 0.25 than its box, not turned" in text) == (face == "crop")
        assert ("7 images show no face" in text) == (face == "crop")
    assert ("even one of a chair" in card) == (face == "none")


def test_all_that_was_left_out_is_counted(sources: Sources, params: Params) -> None:
    data = json.loads(sources.data_metrics.read_text())
    data["unlabelled"]["count"], data["invalid"]["count"] = 3, 2
    data["left_out"] = {"more": "is a link", "a.jpg": "cannot be read: permission denied"}
    data["other_files"] = {".cr2": {"count": 4, "example": "a.CR2"}, ".mov": {"count": 1}}
    data["checks"]["too_small"]["count"] = 40
    data["checks"]["exact_duplicates"] |= {"policy": "keep", "count": 6}
    sources.data_metrics.write_text(json.dumps(data))
    expected = (
        "Left out: not read from the source 2, neither images nor CSVs 5, without a label 3, "
        "unreadable 2, too small 40, near duplicates 1"
    )
    assert f"{expected}." in render_card(sources, params)
    assert expected in Elements(render_page(sources, params, PROVENANCE)).text


def test_metadata_that_was_not_used_is_named(sources: Sources, params: Params) -> None:
    data = json.loads(sources.data_metrics.read_text())
    row = {"rows": 3, "unmatched": 2, "ambiguous": 1, "first": "1.jpg"}
    data["metadata"] |= {
        "skipped_tables": {"old.csv": "it is not UTF-8"},
        "unmatched_rows": {"a.csv": row},
        "ambiguous_rows": {"b.csv": row},
        "other_labels": {"sex": {"images": 2, "first": "m/1.jpg"}},
    }
    sources.data_metrics.write_text(json.dumps(data))
    expected = (
        "Metadata not used: old.csv was skipped: it is not UTF-8; a.csv: 2 of 3 rows match no "
        "image, such as '1.jpg'; b.csv: 1 of 3 rows fit several images, such as '1.jpg'; sex "
        "contradicts the label of 2 images, such as 'm/1.jpg'."
    )
    card = html.unescape(render_card(sources, params))
    assert expected in card
    assert expected in Elements(render_page(sources, params, PROVENANCE)).text


def test_given_boxes_are_said_and_bad_ones_counted(sources: Sources, params: Params) -> None:
    boxes = Boxes(file="b.csv", image="image", left="x", top="y", width="w", height="h")
    crop = params.image.crop.model_copy(update={"boxes": boxes})
    image = params.image.model_copy(update={"face": "crop", "crop": crop})
    data = json.loads(sources.data_metrics.read_text())
    for check, count in (("no_face", 7), ("several_faces", 5), ("bad_box", 4)):
        data["checks"][check] = {"policy": "keep", "count": count, "images": []}
    sources.data_metrics.write_text(json.dumps(data))
    params = params.model_copy(update={"image": image})
    page = Elements(render_page(sources, params, PROVENANCE)).text
    card = " ".join(render_card(sources, params).split())
    for text in (page, card):
        assert "boxes come from b.csv and, where it has none, from a detector" in text
    assert "show several (policy keep), 4 have no usable box (policy keep)." in page
    assert "5 several, 4 have no usable box." in card


@pytest.mark.parametrize(
    ("column", "without", "said"),
    [
        (None, None, "may be in different splits"),
        ("person", 7, "7 images have no person"),
        ("x", 0, ""),
    ],
)
def test_where_photos_of_one_person_are_is_said(
    sources: Sources, params: Params, column: str | None, without: int | None, said: str
) -> None:
    split = params.split.model_copy(update={"group_by": column})
    raw = json.loads(sources.raw_info.read_text()) | {"source": "folder"}
    sources.raw_info.write_text(json.dumps(raw))
    data = json.loads(sources.data_metrics.read_text()) | {"without_subject": without}
    sources.data_metrics.write_text(json.dumps(data))
    card = " ".join(render_card(sources, params.model_copy(update={"split": split})).split())
    assert said in card
    assert ("photos of one person" in card) == bool(said)
    assert "only identical files are kept together" not in card
