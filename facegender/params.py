"""The parameters of the pipeline as frozen types: params.yaml is parsed here and nowhere else."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAMLError

from facegender.errors import UserError, reason_of
from facegender.files import parse_yaml

# Names of types in pydantic's errors, not of parameters.
_KINDS = {"sample", "kaggle", "folder", "folders", "table", "filename"}
_KINDS |= {"AtLeast", "AtMost", "str", "list[str]"}

Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(ge=1)]
# YAML and Hydra read a folder or value called True as a boolean.
_Name = Annotated[str, BeforeValidator(lambda v: str(v).lower() if isinstance(v, bool) else v)]


class _Strict(BaseModel):
    """Frozen, and an unknown or misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FolderLabels(_Strict):
    """Labels from the names of folders: `split.classes`."""

    kind: Literal["folders"]


class Classes(_Strict):
    """Names, case-blind, that stand for each label; `ignore` lists those to leave out."""

    # Folders named 0 and 1 are common, and YAML reads their names as numbers.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    female: tuple[_Name, ...]
    male: tuple[_Name, ...]
    ignore: tuple[_Name, ...]


class TableLabels(Classes):
    """Labels from CSVs, and what the values of their column mean; other columns are metadata."""

    kind: Literal["table"]
    file: str = Field(description="name of the CSV, anywhere in the data; may hold * and ?")
    image: str = Field(description="column that names the image")
    label: str = Field(description="column that holds the label")


class FilenameLabels(Classes):
    """Labels from file names, and what the values mean; other named groups are metadata."""

    kind: Literal["filename"]
    pattern: str = Field(description="regular expression of the whole name, with a group `label`")

    @field_validator("pattern")
    @classmethod
    def _names_a_label(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if "label" not in groups:
            raise ValueError("needs a group (?P<label>...)")
        return pattern


Labels = FolderLabels | TableLabels | FilenameLabels
# Older revisions, which only knew folders, lack the field.
_Labels = Annotated[
    Labels, Field(discriminator="kind", default_factory=lambda: FolderLabels(kind="folders"))
]


class SampleDataset(_Strict):
    """Cartoon faces drawn on this machine."""

    source: Literal["sample"]
    input: str = Field(description="what DVC watches to see this source change")
    labels: _Labels
    per_class: Positive
    image_size: Annotated[int, Field(ge=16)]
    seed: Seed


class KaggleDataset(_Strict):
    """A dataset on Kaggle: `owner/name`, and its version (null: the newest)."""

    source: Literal["kaggle"]
    input: str = Field(description="what DVC watches to see this source change")
    labels: _Labels
    slug: str
    version: Positive | None


class FolderDataset(_Strict):
    """A directory or archive of class folders on disk."""

    source: Literal["folder"]
    input: str = Field(description="what DVC watches to see this source change")
    labels: _Labels
    path: str

    def path_from(self, root: Path) -> Path:
        """Return the path; a relative one starts at `root`, the repository, in any clone of it."""
        return root / Path(self.path).expanduser()


Dataset = Annotated[SampleDataset | KaggleDataset | FolderDataset, Field(discriminator="source")]


class Split(_Strict):
    """How images are divided. Fractions: test of all, validation of what is left."""

    seed: Seed
    predefined: bool
    group_by: str | None = Field(description="column of the metadata that names the subject")
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    classes: Classes


class Archive(_Strict):
    """Limits on an archive or folder; above them it is refused."""

    max_gigabytes: Annotated[float, Field(gt=0)]
    max_ratio: Annotated[float, Field(gt=0)]
    max_files: Positive


# The checks below that need a face detector.
FACE_CHECKS = ("no_face", "several_faces", "bad_box")


class Checks(_Strict):
    """Policy for images that a check finds; duplicates that are kept stay in one split."""

    too_small: Literal["drop", "fail"]
    extreme_shape: Literal["drop", "fail"]
    constant: Literal["drop", "fail"]
    both_labels: Literal["drop", "fail"]
    leakage: Literal["drop", "fail"]
    exact_duplicates: Literal["drop", "keep", "fail"]
    near_duplicates: Literal["drop", "keep", "fail"]
    no_face: Literal["drop", "keep", "fail"]
    several_faces: Literal["drop", "keep", "fail"]
    bad_box: Literal["drop", "keep", "fail"]


class Data(_Strict):
    """Requirements of the data."""

    exclude: str = Field(description="file that lists images to leave out, by path or SHA-256")
    max_invalid_fraction: Fraction
    max_dropped_fraction: Fraction
    min_side: Positive
    max_aspect_ratio: Annotated[float, Field(ge=1)]
    min_per_class: Positive
    checks: Checks


class Boxes(_Strict):
    """A CSV of the dataset that holds boxes of faces, in pixels, and the names of its columns."""

    file: str = Field(description="name of the CSV, anywhere in the data; may hold * and ?")
    image: str = Field(description="column that names the image")
    left: str
    top: str
    width: str
    height: str


class Crop(_Strict):
    """How a face is found and cut out, with `image.face: crop`."""

    margin: Annotated[float, Field(ge=0, le=4, description="added to the box, as a share of it")]
    align: bool
    min_score: Annotated[float, Field(ge=0, le=1)]
    min_size: Annotated[int, Field(ge=1, description="pixels of the picture")]
    whole_from: Annotated[float, Field(gt=0, le=4, description="share of the shorter side")]
    jitter: Annotated[float, Field(ge=0, le=0.5, description="of training, share of the side")]
    boxes: Boxes | None = Field(description="boxes to take instead of the detector's")

    @model_validator(mode="after")
    def _eyes_are_the_detectors(self) -> Self:
        if self.align and self.boxes is not None:
            raise ValueError("align needs eyes, which only the detector finds: boxes must be null")
        return self


class Image(_Strict):
    """The model's input."""

    size: Annotated[int, Field(ge=32, le=1024, description="pixels a side")]
    face: Literal["none", "crop"]
    crop: Crop


class Model(_Strict):
    """MobileNet v1 and its head."""

    alpha: Annotated[float, Field(gt=0, le=2)]
    weights: str = Field(description="imagenet, none, or the path of a weights file")
    weights_sha256: str | None
    dropout: Fraction
    test_time_flip: bool
    builtin: dict[str, str] = Field(description="what DVC watches if `weights` is not a file")
    input: str = Field(description="file that DVC watches: `weights`, if it is a path")

    @model_validator(mode="after")
    def _dvc_watches_the_weights(self) -> Self:
        watched = self.builtin.get(self.weights, self.weights)
        if self.input != watched:
            # For example after editing params.yaml by hand, which composes nothing.
            raise ValueError(f"input is {self.input}, but weights needs {watched}: set both")
        return self

    @model_validator(mode="after")
    def _a_digest_pins_a_file(self) -> Self:
        if self.weights_sha256 is not None and self.weights in self.builtin:
            raise ValueError(
                f"weights_sha256 pins a weights file, and weights is {self.weights}: pass the "
                "file's path, or null"
            )
        return self


class Augmentation(_Strict):
    """Random changes of training images: fractions of the image's side, or of its contrast."""

    zoom: Fraction
    width_shift: Fraction
    height_shift: Fraction
    rotation: Annotated[float, Field(ge=0, le=0.5, description="fraction of a full turn")]
    horizontal_flip: bool
    brightness: Fraction
    contrast: Fraction


class Train(_Strict):
    """The recipe: a phase with the base frozen (`head_epochs`), then fine-tuning (`epochs`)."""

    seed: Seed
    batch_size: Positive
    optimizer: Literal["adam", "rmsprop", "sgd"]
    weight_decay: Annotated[float, Field(ge=0, description="decoupled: adam is then AdamW")]
    head_epochs: Annotated[int, Field(ge=0)]
    head_learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "cosine"]
    warmup_epochs: Annotated[int, Field(ge=0)]
    min_steps_per_epoch: Annotated[int, Field(ge=0)]
    small_image_size: Annotated[int, Field(ge=32)] | None
    small_epochs: Annotated[int, Field(ge=0)]
    ema_epochs: Annotated[float, Field(ge=0, description="span of the averaged weights")]
    fine_tune_from: str = Field(
        description="all, or the name of the first MobileNet layer to train"
    )
    batch_norm: Literal["train", "frozen"]
    batch_norm_momentum: Fraction
    label_smoothing: Fraction
    class_weights: Literal["none", "balanced"]
    early_stopping_patience: Positive | None
    keep: Literal["best", "last"]
    calibrate: bool
    strategy: Literal["none", "mirrored", "multi_worker"]
    mixed_precision: bool
    batch_per_device: bool
    augmentation: Augmentation

    @model_validator(mode="after")
    def _small_images_need_frozen_batch_norm(self) -> Self:
        if self.small_epochs and (self.batch_norm != "frozen" or self.small_image_size is None):
            # Statistics of small images are not those of full ones.
            raise ValueError("small_epochs needs small_image_size, and batch_norm: frozen")
        return self


class Evaluate(_Strict):
    """How the test split is judged."""

    threshold: Annotated[float, Field(gt=0, lt=1)]
    batch_size: Positive
    min_group_size: Positive
    groups: list[str | Annotated[list[str], Field(min_length=2, max_length=2)]] | None
    seed: Seed


class Export(_Strict):
    """How the model is converted to int8."""

    calibration_images: Positive
    seed: Seed


class AtLeast(_Strict):
    """A floor of a metric that is better when it is higher."""

    # NaN would pass every model: no comparison with it is true.
    at_least: FiniteFloat


class AtMost(_Strict):
    """A limit of a metric that is better when it is lower."""

    at_most: FiniteFloat


class MaxDrop(_Strict):
    """How much worse than the baseline is still tolerated, in the metric's own unit."""

    accuracy: Fraction
    recall: Fraction
    group: Fraction
    f1: Fraction
    ece: Fraction


class Cost(_Strict):
    """Ratios of candidate to baseline, beyond which the gate warns."""

    max_size_ratio: Annotated[float, Field(ge=1)]
    max_time_ratio: Annotated[float, Field(ge=1)]
    min_speed_ratio: Annotated[float, Field(gt=0, le=1)]


class Gate(_Strict):
    """Requirements of a model, alone and compared with the baseline."""

    floors: dict[str, AtLeast | AtMost]
    max_drop: MaxDrop
    significance: Annotated[float, Field(gt=0, lt=1)]
    bootstrap_samples: Positive
    seed: Seed
    reference: str | None = None
    test: Literal["difference", "noninferiority"] = "difference"
    without_evidence: Literal["pass", "warn", "refuse_drops", "refuse"] = "refuse_drops"
    cost: Cost


class Compute(_Strict):
    """Where images are preprocessed; their bytes do not depend on it."""

    backend: Literal["loky", "dask"]
    scheduler: Annotated[str, Field(pattern=r"^(tcp|tls)://\S+:\d+$")] | None
    patience: Annotated[float, Field(gt=0, description="seconds")]

    @model_validator(mode="after")
    def _a_cluster_has_an_address(self) -> Self:
        if self.backend == "dask" and self.scheduler is None:
            raise ValueError("backend: dask needs scheduler, such as tcp://10.0.0.1:8786")
        return self

    @property
    def where(self) -> dict[str, Any]:
        """Keyword arguments of `data.parallel_tasks.run_tasks`."""
        scheduler = self.scheduler if self.backend == "dask" else None
        return {"scheduler": scheduler, "patience": self.patience}


class Params(_Strict):
    """All of params.yaml."""

    dataset: Dataset
    archive: Archive
    data: Data
    split: Split
    image: Image
    model: Model
    train: Train
    evaluate: Evaluate
    export: Export
    gate: Gate
    # Left out of dumps, and so of digests, the page and MLflow's parameters: results must not
    # differ by the machines that made them.
    compute: Compute = Field(exclude=True)
    # Only for DVC; older revisions lack it.
    listed: tuple[str, ...] = Field(default=(), exclude=True)

    def to_json(self) -> str:
        """Return all parameters as JSON, including those that dumps leave out."""
        rest = {"compute": self.compute.model_dump(mode="json"), "listed": self.listed}
        return json.dumps(self.model_dump(mode="json") | rest)


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: the file is missing, is not YAML in UTF-8, or a key is unknown, missing or out of
            range.
    """
    try:
        return Params.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(
            f"Cannot read {path.name}: {reason_of(error)}. Correct it, or compose it again: "
            "`make params`."
        ) from error
    except ValidationError as error:
        raise UserError(
            f"{path.name} is not valid: {faults_of(error)}. Compare it with the files in conf/, "
            "which document every parameter. `make params` composes it again, for the sample."
        ) from error


def faults_of(error: ValidationError) -> str:
    """Return in one line what is wrong with parameters, each with its dotted name."""
    faults = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"] if part not in _KINDS)
        faults.append(f"{name}: {fault['msg']}" if name else fault["msg"])
    return "; ".join(faults)


def flatten(params: Params) -> dict[str, str | int | float | bool | None]:
    """Return every parameter under its dotted name, as `dvc params` and MLflow show them."""
    flat: dict[str, str | int | float | bool | None] = {}

    def visit(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(value, list | tuple):
            flat[prefix] = ", ".join(str(item) for item in value)
        else:
            flat[prefix] = value  # type: ignore[assignment]

    visit("", params.model_dump())
    return flat
