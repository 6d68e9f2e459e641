"""The page to try a model, in a real browser.

With FACEGENDER_SCREENSHOTS=<folder> it is kept as a picture, too.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from facegender.inference.threshold import write_threshold
from tests.conftest import Exported
from tests.pipeline.conftest import Clone, served
from tools.ui import HOST

pytestmark = pytest.mark.slow

PAGE_MS = 60_000
# Picture and model to use when the screenshot is to be kept.
MODEL, PICTURE = (os.environ.get(f"FACEGENDER_DEMO_{name}") for name in ("MODEL", "PICTURE"))


@pytest.fixture(scope="module")
def address(
    browser: Browser, exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("demo")
    command = ("facegender", "demo", "--model", MODEL or str(exported.float32))
    with served(Clone(folder), command, folder / "log", options=()) as port:
        yield f"http://{HOST}:{port}"


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(permissions=["camera"], viewport={"width": 1100, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PAGE_MS)
    expect.set_options(timeout=PAGE_MS)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    # Violations of its content security policy come here, too.
    assert [text for text in faults if "422" not in text] == []
    assert {urlsplit(url).hostname for url in asked if not url.startswith("data:")} == {HOST}


def test_an_uploaded_picture_is_judged_and_explained(
    page: Page, exported: Exported, tmp_path: Path
) -> None:
    expect(page.get_by_text("not facts about a person")).to_be_visible()
    unsure = int(np.argsort(abs(exported.probabilities - 0.5))[8])
    upload = Path(PICTURE or tmp_path / "face.png")
    if not PICTURE:
        Image.fromarray(exported.images[unsure]).save(upload)
    page.locator("#file").set_input_files(upload)
    line = page.get_by_role("listitem")
    expect(line).to_have_text(re.compile(r"^(fe)?male P\(male\) = \d\.\d{4}, the whole picture$"))
    shown = float(re.findall(r"\d\.\d+", line.inner_text())[0])
    expect(page.get_by_text("no square moves P(male) by more than")).to_be_visible()
    crop, covered = (
        page.locator(f"#{name}").evaluate("canvas => canvas.toDataURL()")
        for name in ("crop", "map")
    )
    assert crop != covered
    if folder := os.environ.get("FACEGENDER_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / "demo.png", full_page=True)
    if not PICTURE:
        assert shown == pytest.approx(exported.probabilities[unsure], abs=1e-3)
        page.get_by_role("slider").fill("1")
        expect(line).to_have_text(re.compile("^uncertain P"))


def test_the_slider_abstains_as_predict_does(
    browser: Browser, exported: Exported, tmp_path: Path
) -> None:
    model = tmp_path / "model.tflite"
    content = exported.float32.read_bytes()
    model.write_bytes(content[: content.index(b"PK\3\4", 20)])
    write_threshold(model, 0.8)
    likely = int(np.argmin(abs(exported.probabilities - 0.7)))
    Image.fromarray(exported.images[likely]).save(tmp_path / "face.png")
    command = ("facegender", "demo", "--model", str(model))
    with served(Clone(tmp_path), command, tmp_path / "log", options=()) as port:
        page = browser.new_page()
        page.goto(f"http://{HOST}:{port}")
        page.locator("#file").set_input_files(tmp_path / "face.png")
        line, slider = page.get_by_role("listitem"), page.get_by_role("slider")
        # P(male) is below the threshold, so the label is female, whose probability is about 0.3.
        for below, label in ((None, "female"), ("0.25", "female"), ("0.5", "uncertain")):
            if below:
                slider.fill(below)
            expect(line).to_have_text(re.compile(f"^{label} P"))
        page.close()


def test_a_bad_file_is_named(page: Page) -> None:
    page.locator("#file").set_input_files(
        {"name": "face.jpg", "mimeType": "image/jpeg", "buffer": b"%PDF-1.7"}
    )
    expect(page.get_by_role("status")).to_contain_text("PDF is not supported")
    expect(page.locator("#answer")).to_be_hidden()


def test_a_picture_of_the_camera_is_judged(page: Page) -> None:
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.get_by_role("listitem")).to_contain_text("P(male)")
    expect(page.locator("#video")).to_be_hidden()
