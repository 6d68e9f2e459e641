import math
import shutil
from pathlib import Path

import pytest
import yaml

from facegender.errors import UserError
from facegender.params import Classes, Params, TableLabels, flatten, load_params
from facegender.runtime.dvc_context import pipeline_paths
from tests.conftest import commit_all, fill, init_repository, run_command
from tests.unit.conftest import ABSENT, composed, edit_params
from tools.compose_params import ROOT, compose


def test_committed_params_are_the_composition_of_the_defaults(tmp_path: Path) -> None:
    compose(tmp_path / "params.yaml")
    assert (ROOT / "params.yaml").read_text() == (tmp_path / "params.yaml").read_text(), (
        "params.yaml and conf/ differ: run `make params`, and commit both"
    )


def test_make_params_prints_what_it_changes(tmp_path: Path) -> None:
    options = ("-n", "--no-print-directory", "-o.venv/installed")  # `make test` is a make, too
    *_, prints = run_command("make", *options, "params").stdout.splitlines()
    init_repository(tmp_path)
    # Such as `dvc exp run -S dataset=folder` wrote, which conf/ does not have.
    commit_all(fill(tmp_path, {"params.yaml": "dataset: folder\nseed: 42\n"}))
    fill(tmp_path, {"params.yaml": "dataset: sample\nseed: 42\n"})
    done = run_command("sh", "-c", prints, cwd=tmp_path)
    assert done.stdout.endswith("\n-dataset: folder\n+dataset: sample\n")


@pytest.mark.parametrize("recipe", ["quick", "paper", "fast", "best"])
@pytest.mark.parametrize(
    "dataset", [["dataset=sample"], ["dataset=kaggle"], ["dataset=folder", "dataset.path=faces"]]
)
def test_every_composition_is_valid(tmp_path: Path, recipe: str, dataset: list[str]) -> None:
    params = composed(tmp_path, f"recipe={recipe}", *dataset)
    assert params.dataset.source == dataset[0].split("=")[1]
    assert params.image.size == {"quick": 96, "paper": 224, "fast": 128, "best": 160}[recipe]


def test_all_parameters_pass_through_json(tmp_path: Path) -> None:
    cluster = ["compute.backend=dask", "compute.scheduler=tcp://10.0.0.1:8786"]
    params = composed(tmp_path, "dataset=sample", *cluster)
    assert Params.model_validate_json(params.to_json()) == params


@pytest.mark.parametrize("dataset", ["sample", "kaggle", "folder", "table", "celeba"])
def test_what_lies_on_disk_is_listed_and_dvc_watches_the_listing(
    tmp_path: Path, dataset: str
) -> None:
    compose(tmp_path / "params.yaml", f"dataset={dataset}", "+dataset.path=x")
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    on_disk = dataset not in {"sample", "kaggle"}
    listing = pipeline_paths((ROOT / "dvc.yaml").read_text())["listing"]
    assert params["listed"] == (["folder"] if on_disk else [])
    assert (params["dataset"]["input"] == listing) == on_disk


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("train", "epoch", 3, "train.epoch"),
        ("train", "epochs", -1, "train.epochs"),
        ("train", "strategy", "horovod", "train.strategy"),
        ("train", "mixed_precision", "float16", "train.mixed_precision"),
        ("train", "batch_per_device", 32, "train.batch_per_device"),
        ("split", "test_fraction", 1.5, "split.test_fraction"),
        ("dataset", "source", "flickr", "dataset"),
        ("dataset", "per_class", 0, "dataset.per_class"),
        ("gate", "floors", {"f1": {"at_least": "x"}}, "gate.floors.f1.at_least"),
        ("gate", "floors", {"f1": {"at_least": math.nan}}, "gate.floors.f1.at_least"),
        ("evaluate", "threshold", 0, "evaluate.threshold"),
        ("evaluate", "groups", ["a", ["b"]], "evaluate.groups.1"),
        ("compute", "backend", "dask", "compute"),
        ("compute", "scheduler", "localhost", "compute.scheduler"),
        ("compute", "patience", 0, "compute.patience"),
    ],
)
def test_a_bad_parameter_is_named(
    tmp_path: Path, section: str, key: str, value: object, named: str
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    edit_params(tmp_path, **{f"{section}__{key}": value})
    with pytest.raises(UserError, match=rf"valid: {named}: "):
        load_params(tmp_path / "params.yaml")


def test_a_digest_without_a_weights_file_is_refused(tmp_path: Path) -> None:
    digest = "model.weights_sha256=ab"
    with pytest.raises(UserError, match="pins a weights file, and weights is imagenet"):
        composed(tmp_path, "recipe=best", digest)
    composed(tmp_path, "recipe=best", digest, "model.weights=conf/config.yaml")


def test_parameters_of_before_take_labels_from_folders(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    edit_params(tmp_path, dataset__labels=ABSENT)
    assert load_params(tmp_path / "params.yaml").dataset.labels.kind == "folders"


@pytest.mark.parametrize("content", [None, "# jörg".encode("latin-1"), b"", b"a: [1"])
def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"params\.yaml[ :].*[a-z]") as caught:
        load_params(tmp_path / "params.yaml")
    assert ": :" not in str(caught.value)


def test_flatten_gives_dotted_names(params: Params) -> None:
    flat = flatten(params)
    assert flat["train.augmentation.zoom"] == 0.1
    assert flat["split.classes.male"] == "male, males, man, men, m"
    assert not any(isinstance(value, dict | list | tuple) for value in flat.values())


def test_where_the_work_is_done_is_no_part_of_what_it_is(params: Params) -> None:
    compute = params.compute.model_copy(update={"backend": "dask", "scheduler": "tcp://here:1"})
    elsewhere = params.model_copy(update={"compute": compute})
    assert params.compute.where["scheduler"] is None
    assert elsewhere.compute.where["scheduler"] == "tcp://here:1"
    # By the one MLflow and the page are told, by the other a training knows its own.
    assert flatten(elsewhere) == flatten(params)
    assert elsewhere.model_dump_json() == params.model_dump_json()


def test_the_document_names_every_parameter(params: Params) -> None:
    table = (ROOT / "docs" / "parameters.md").read_text()
    names = {name.split(".")[-1] for name in flatten(params) if "classes." not in name}
    names |= set(params.compute.model_dump())
    assert sorted(name for name in names if f"`{name}`" not in table) == []


def test_numbers_name_class_folders() -> None:
    classes = Classes.model_validate({"female": [0, "women"], "male": [1], "ignore": []})
    assert classes == Classes(female=("0", "women"), male=("1",), ignore=())


def test_true_and_false_are_labels_as_hydra_and_yaml_write_them(tmp_path: Path) -> None:
    values = ["dataset.labels.female=[False]", "dataset.labels.male=[true]"]
    labels = composed(tmp_path, "dataset=table", "dataset.path=x", *values).dataset.labels
    assert isinstance(labels, TableLabels)
    assert (labels.female, labels.male) == (("false",), ("true",))
