"""The page of a real run, in a real browser.

With FACEGENDER_SCREENSHOTS=<folder>, report.png is kept: the page of the committed results.
"""

import os
from pathlib import Path

import mlflow
import pytest
from PIL import Image
from playwright.sync_api import Browser

from facegender.gate.verdict import Comparison, Report
from facegender.params import Params
from facegender.report.page import Provenance, render_page
from tests.pipeline.conftest import Clone
from tests.results import committed_sources
from tools.compose_params import ROOT

pytestmark = pytest.mark.slow

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 1000}


def problems(browser: Browser, path: Path, scheme: str, picture: Path | None = None) -> list[str]:
    """Open a page from disk, and return all that a reader would not want."""
    found: list[str] = []
    context = browser.new_context(viewport=DESK, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.on("console", lambda message: found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri(), wait_until="networkidle")
    found += [
        f"request: {url}" for url in requests if url != path.as_uri() and not url.startswith("data")
    ]
    found += page.eval_on_selector_all(
        "img", "all => all.filter(i => !i.naturalWidth).map(i => 'not shown: ' + i.alt)"
    )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = max(int(part) for part in background[4:-1].split(",")) < 128
    if dark != (scheme == "dark"):
        found.append(f"{background} in {scheme} mode")
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=picture, animations="disabled")
        with Image.open(picture) as image:
            small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(picture, optimize=True)
    for viewport in (DESK, PHONE):
        page.set_viewport_size(viewport)  # type: ignore[arg-type]
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            found.append(f"{wide} pixels too wide at {viewport['width']}")
    context.close()
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_errors_or_requests(
    reproduced: Clone, browser: Browser, scheme: str
) -> None:
    assert problems(browser, reproduced.root / "metrics/report.html", scheme) == []


def test_what_the_browser_is_watched_for_is_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='background:#fff'><img src=gone.png alt=face>"
        "<p style='width:2000px;height:1px'></p>"
        "<script>console.log('hello'); missing()</script>"
    )
    found = "\n".join(problems(browser, page, "dark"))
    for one in ("request: file:", "hello", "error: missing", "not shown: face", "too wide", "dark"):
        assert one in found


def test_the_committed_results_fill_the_page(
    browser: Browser, params: Params, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    provenance = Provenance(code="0" * 64, lock="0" * 64, versions={})
    path.write_text(render_page(committed_sources(ROOT), params, provenance))
    folder = os.environ.get("FACEGENDER_SCREENSHOTS")
    picture = Path(folder) / "report.png" if folder else None
    assert problems(browser, path, "light", picture) == []


def test_a_long_name_in_a_finding_fits_a_phone(
    browser: Browser, params: Params, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    long = "facegender/data/a_module_with_a_very_long_name_that_is_stale.py"
    gate = Report(
        "now",
        "main",
        [],
        undecided=[long],
        left_out=[long],
        comparisons=[Comparison("accuracy", 9, 0.5, 0.5, 0.0)],
    )
    provenance = Provenance(code="0" * 64, lock="0" * 64, versions={})
    path.write_text(render_page(committed_sources(ROOT), params, provenance, gate))
    assert problems(browser, path, "light") == []


def test_the_command_compares_and_logs(reproduced: Clone, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    done = reproduced.run("facegender", "report", "--baseline", "HEAD", "--output", str(output))
    assert "which holds the evaluation" in done.stdout
    text = output.read_text()
    assert reproduced.run("git", "rev-parse", "HEAD").stdout.strip() in text
    assert "every test image has the same prediction as before" in text
    (run,) = reproduced.runs()
    assert run.info.status == "FINISHED"
    logged = mlflow.MlflowClient().list_artifacts(run.info.run_id)
    assert "page.html" in {item.path for item in logged}


def test_a_commit_without_results_is_a_clear_error(reproduced: Clone, tmp_path: Path) -> None:
    for revision, says in (("HEAD~1", "no test metrics in HEAD~1"), ("no-such", "no-such")):
        done = reproduced.run(
            "facegender", "report", "--baseline", revision, "--output", "x.html", check=False
        )
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert not (reproduced.root / "x.html").exists()
