"""MLflow's own pages, in a real browser, on the runs that the pipeline logs.

With FACEGENDER_SCREENSHOTS=<folder> they are kept as pictures, too.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pytest
from mlflow.entities import Run
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.pipeline.conftest import EPOCHS, HOST, Clone, served

pytestmark = pytest.mark.slow

# Two cores may have other work: a page is up in some 3 s.
PAGE_MS = 60_000


@dataclass(frozen=True)
class Ui:
    """A running `make ui`, and in its store a sweep: runs of 3, 4 and 12 epochs, their parent.

    Attributes:
        printed: the addresses that it prints, of the pages `runs` and `compare`.
    """

    printed: dict[str, str]
    runs: list[Run]
    parent: Run

    def page(self, path: str, **query: object) -> str:
        encoded = urlencode(
            {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in query.items()
            },
            quote_via=quote,
        )
        return f"{self.printed['runs'].split('#')[0]}#/{path}?{encoded}"

    @property
    def names(self) -> list[str]:
        return [run.info.run_name for run in self.runs]

    @property
    def all_three(self) -> dict[str, list[str]]:
        """Requests of the pages that show several runs."""
        return {
            "runs": [run.info.run_id for run in self.runs],
            "experiments": [self.runs[0].info.experiment_id],
        }


@pytest.fixture(scope="module")
def ui(browser: Browser, swept: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    # `browser` comes first: without one, nothing here needs to run.
    every = {run.info.run_name: run for run in swept.runs()}
    runs = [every[f"sweep-{number}"] for number in (1, 2, 3)]
    assert [run.data.params["train.epochs"] for run in runs] == ["3", "4", str(EPOCHS)]
    log = tmp_path_factory.mktemp("ui") / "ui.log"
    with served(swept, (sys.executable, "-m", "tools.ui"), log, options=()):
        while "Ctrl-C" not in log.read_text():  # it prints the addresses once the server answers
            time.sleep(0.2)
        yield Ui(
            dict(re.findall(r"^(\w+): +(http.*)$", log.read_text(), re.M)), runs, every["sweep"]
        )


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    # A worker of the page's would not ask `only_this_machine`.
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, service_workers="block", locale="en-US"
    )
    context.route("**/*", only_this_machine)
    page = context.new_page()
    page.set_default_timeout(PAGE_MS)
    expect.set_options(timeout=PAGE_MS)
    yield page
    context.close()


def only_this_machine(route: Route) -> None:
    address = urlsplit(route.request.url)
    if address.scheme in {"data", "blob"} or address.hostname == HOST:
        route.continue_()
    else:
        route.abort()


@pytest.fixture
def keep(page: Page) -> Callable[[str], None]:
    """Return a function that keeps a picture of the page, if pictures are wanted."""
    folder = os.environ.get("FACEGENDER_SCREENSHOTS")

    def take(name: str) -> None:
        if folder:
            path = Path(folder) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=path, animations="disabled")
            with Image.open(path) as picture:
                # A page has few colours: a palette halves the file.
                small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(path, optimize=True)

    return take


def number(cell: Locator) -> float:
    expect(cell).to_have_text(re.compile(r"\d"))
    return float(cell.inner_text())


def test_the_list_shows_a_sweeps_runs_with_their_accuracy(
    ui: Ui, page: Page, keep: Callable[[str], None]
) -> None:
    page.goto(ui.printed["runs"])
    parent = page.locator(f'[row-id="{ui.parent.info.run_id}"]')
    expect(parent.get_by_role("link", name="sweep", exact=True)).to_be_visible()
    # Its experiments are folded under it.
    expect(page.get_by_role("link", name=ui.names[0], exact=True)).to_be_hidden()
    parent.get_by_role("button").first.click()
    for name in ui.names:
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    for run in ui.runs:
        row = page.locator(f'[row-id="{run.info.run_id}"]')
        for metric in ("test_accuracy", "test_f1", "test_ece"):
            cell = row.locator(f'[col-id="metrics.`{metric}`"]')
            expect(cell).to_be_in_viewport(ratio=1)
            assert number(cell) == pytest.approx(run.data.metrics[metric], abs=1e-3)
    keep("mlflow-runs")


def test_three_runs_can_be_compared(ui: Ui, page: Page, keep: Callable[[str], None]) -> None:
    page.goto(ui.printed["compare"])
    # The last run comes first.
    runs = sorted(ui.runs, key=lambda run: run.info.start_time, reverse=True)
    epochs = [run.data.params["train.epochs"] for run in runs]
    expect(page.get_by_role("heading", name="Comparing 3 Runs")).to_be_visible()

    def row(name: str) -> Locator:
        head = page.get_by_role("rowheader", name=name, exact=True)
        return page.get_by_role("row").filter(has=head)

    expect(row("Run Name:").get_by_role("cell")).to_have_text([run.info.run_name for run in runs])
    expect(row("train.epochs").get_by_role("cell")).to_have_text(epochs)
    expect(row("train.seed").get_by_role("cell")).to_have_text(["42"] * 3)
    # Metrics are no table but a column of names and, beside it, a grid with a column for each run.
    columns = page.get_by_role("grid")
    expect(columns).to_have_count(2)
    # Only as many rows as have room are in the page.
    expect(columns.nth(0)).to_contain_text("export_int8.accuracy")
    expect(columns.nth(1)).to_contain_text(re.compile(r"\d"))
    names, values = (column.inner_text().split() for column in columns.all())
    for index, run in enumerate(runs):
        shown = dict(zip(names, values[index :: len(runs)], strict=False))
        for metric in ("accuracy", "export_float32.accuracy", "export_int8.accuracy"):
            assert float(shown[metric]) == pytest.approx(run.data.metrics[metric], abs=1e-3)

    # Only what differs: the parameter that was changed.
    page.get_by_role("button", name="Visualizations").click()
    page.get_by_role("switch").nth(0).click()
    page.get_by_role("switch").nth(1).click()
    expect(row("train.seed")).to_be_hidden()
    expect(row("train.epochs").get_by_role("cell")).to_have_text(epochs)
    page.get_by_role("button", name="Run details").evaluate("head => head.scrollIntoView()")
    keep("mlflow-compare")


def test_its_pages_tell_nobody_how_they_are_used(ui: Ui, page: Page) -> None:
    server = ui.printed["runs"].split("#")[0]
    config = page.request.get(f"{server}ajax-api/3.0/mlflow/ui-telemetry").json()
    assert config["disable_ui_telemetry"] is True


def test_a_port_in_use_is_named(ui: Ui, swept: Clone) -> None:
    port = str(urlsplit(ui.printed["runs"]).port)
    done = swept.run(sys.executable, "-m", "tools.ui", "--port", port, check=False)
    assert done.returncode == 1
    assert f"error: Port {port} cannot be used" in done.stderr


def test_three_runs_curves_are_in_one_chart(
    ui: Ui, page: Page, keep: Callable[[str], None]
) -> None:
    page.goto(
        ui.page(
            "metric",
            **ui.all_three,
            metric='"val_loss"',
            plot_metric_keys=["val_loss"],
            x_axis="step",
            show_point="true",
            workflowType="machine_learning",
        )
    )
    for name in ui.names:
        expect(page.get_by_text(f"{name} (val_loss)", exact=True)).to_be_visible()
    for run in ui.runs:
        # A point for each epoch, no more. Not by colour: runs may get the same one.
        last = f".points > path:nth-child({run.data.params['train.epochs']}):last-child"
        line = page.locator(f".js-plotly-plot .scatterlayer .trace:has({last})")
        expect(line.locator("path.js-line").first).to_be_visible()
        row = page.get_by_role("row").filter(has_text=run.info.run_name)
        last = row.get_by_text(f"(step={run.data.params['train.epochs']})").first
        shown = float(last.inner_text().split()[0])
        assert shown == pytest.approx(run.data.metrics["val_loss"], abs=1e-3)
    keep("mlflow-curves")
