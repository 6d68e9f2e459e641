"""The built-in sample: cartoon faces whose labels follow from the distributions below.

DiceBear's `avataaars` style draws the pictures. Their labels serve to test and teach the pipeline;
they say nothing about people. `python -m facegender.data.sources.sample` prints the distributions
and the accuracy of the best possible classifier (docs/sample-data.md).
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import sys
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import version as package_version
from importlib.resources import files
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import resvg_py
from dicebear import Avatar, Style
from PIL import Image
from tqdm import tqdm

CLASSES = ("female", "male")

# The probability of each value, in percent, for (female, male). Given the class, the attributes are
# independent. Both classes have every value, so none decides the label alone.
SIGNAL: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "hair": {
        # Long: most of one class.
        "straight01": (19.5, 0.2),
        "straight02": (16, 0.2),
        "straightAndStrand": (15, 0.2),
        "curvy": (15, 0.2),
        "bigHair": (10.3, 0.1),
        "miaWallace": (10, 0.1),
        "bob": (9.6, 0.2),
        # Short: most of the other.
        "shortFlat": (0.3, 23.5),
        "shortRound": (0.2, 20),
        "shortWaved": (0.3, 18),
        "theCaesar": (0.2, 14),
        "sides": (0.1, 10),
        "shortCurly": (0.2, 10.1),
        # As common in both: other attributes must decide.
        "dreads": (0.4, 0.4),
        "fro": (0.4, 0.4),
        "winterHat1": (0.4, 0.4),
        "hat": (0.4, 0.4),
        # In both, more common in one.
        "hijab": (1.5, 0.2),
        "turban": (0.2, 1.4),
    },
    "facial_hair": {
        "none": (98.5, 15),
        "beardLight": (0.4, 29),
        "beardMedium": (0.4, 29),
        "beardMajestic": (0.4, 16),
        "moustacheFancy": (0.3, 11),
    },
    "accessories": {
        "none": (70, 72),
        "round": (11, 5),
        "prescription01": (6, 6),
        "prescription02": (5, 9),
        "sunglasses": (8, 8),
    },
    "clothing": {
        "shirtScoopNeck": (28, 8),
        "overall": (12, 6),
        "shirtCrewNeck": (20, 22),
        "collarAndSweater": (16, 18),
        "hoodie": (14, 24),
        "blazerAndShirt": (10, 22),
    },
}

# Drawn uniformly, from the same values for both classes: a model must learn to ignore them. No
# colour of hair, clothing or background resembles one of skin, so beards, necklines and faces show.
NUISANCE: Mapping[str, tuple[str, ...]] = {
    "skin_color": ("7a5240", "a9714b", "cf9468", "edb98a", "ffdbb4"),
    "hair_color": ("1c1210", "3b241d", "5a2d1c", "8f3a16", "c9a23f", "a8a3a3"),
    "clothing_color": ("262e33", "25557c", "3c4f5c", "5199e4", "6a4c93", "a7ffc4", "ff5c5c"),
    "background_color": ("b6e3f4", "c0aede", "d1d4f9", "e8e8e8", "cdeac0"),
    "eyes": ("default", "happy", "side"),
    "eyebrows": ("default", "defaultNatural", "raisedExcited", "raisedExcitedNatural"),
    "mouth": ("serious", "smile", "twinkle"),
    "mirrored": ("no", "yes"),
}

# First and last of whole numbers, drawn uniformly for both classes. The ranges keep the face in the
# picture, and the cut edge of the shoulders at its border.
PLACEMENT: Mapping[str, tuple[int, int]] = {
    "rotation_degrees": (-6, 6),
    "scale_percent": (98, 110),
    "shift_x_percent": (-4, 4),
    "shift_y_percent": (5, 9),
}

# A hijab hides the clothing: it is recorded as covered, and always drawn the same.
COVERED = "covered"
_UNDER_HIJAB = "shirtCrewNeck"

# For errors by group; anything else in `hair` is long.
HEADWEAR = frozenset({"hat", "hijab", "turban", "winterHat1"})
SHORT_HAIR = frozenset(
    {"shortFlat", "shortRound", "shortWaved", "theCaesar", "sides", "shortCurly"}
)

_CHUNK = 20  # pictures a task: about 0.2 s
# The style's name of each attribute that is drawn as a component.
_COMPONENTS = {
    "hair": "top",
    "facial_hair": "facialHair",
    "accessories": "accessories",
    "clothing": "clothes",
    "eyes": "eyes",
    "eyebrows": "eyebrows",
    "mouth": "mouth",
}


def version() -> str:
    """Return what decides the pictures' bytes: versions of packages, and a digest of the tables."""
    tables = json.dumps([SIGNAL, NUISANCE, PLACEMENT, _UNDER_HIJAB])
    packages = ("dicebear-core", "resvg-py", "numpy")
    return ", ".join(
        [
            f"avataaars {package_version('dicebear-styles')}",
            *(f"{package} {package_version(package)}" for package in packages),
            f"distributions {hashlib.sha256(tables.encode()).hexdigest()[:8]}",
        ]
    )


@cache
def _style() -> Style:
    # Parsed once a process, because that takes as long as drawing many pictures.
    return Style.from_json(
        files("dicebear_styles").joinpath("avataaars.json").read_text(encoding="utf-8")
    )


def show(signal: Mapping[str, str]) -> dict[str, str]:
    """Return the visible values of `SIGNAL`'s attributes: a hijab covers the clothing."""
    return {**signal, "clothing": COVERED} if signal["hair"] == "hijab" else dict(signal)


def draw_attributes(label: str, index: int, seed: int) -> dict[str, str | int]:
    """Return the attributes of one picture, which depend only on the arguments.

    Args:
        label: female or male.
        index: number of the picture within its class.
        seed: random seed, from 0 up.
    """
    column = CLASSES.index(label)
    generator = np.random.default_rng([seed, column, index])
    signal: dict[str, str] = {}
    for name, values in SIGNAL.items():
        percents = np.array([pair[column] for pair in values.values()])
        signal[name] = str(generator.choice(list(values), p=percents / 100))
    drawn: dict[str, str | int] = {**show(signal)}
    hair = drawn["hair"]
    drawn["hair_length"] = (
        COVERED if hair in HEADWEAR else "short" if hair in SHORT_HAIR else "long"
    )
    drawn["headwear"] = "yes" if hair in HEADWEAR else "no"
    for name, options in NUISANCE.items():
        drawn[name] = str(generator.choice(options))
    for name, (first, last) in PLACEMENT.items():
        drawn[name] = int(generator.integers(first, last, endpoint=True))
    return drawn


def render(attributes: Mapping[str, str | int], image_size: int) -> bytes:
    """Return the picture of `attributes` as PNG, `image_size` pixels a side."""
    # Each option has one value, so that DiceBear draws nothing at random that shows.
    options: dict[str, Any] = {
        "seed": "facegender",
        "skinColor": attributes["skin_color"],
        "hairColor": attributes["hair_color"],
        "facialHairColor": attributes["hair_color"],
        "hatColor": attributes["clothing_color"],
        "clothesColor": attributes["clothing_color"],
        "accessoriesColor": "262e33",
        "backgroundColor": attributes["background_color"],
        "rotate": attributes["rotation_degrees"],
        "scale": int(attributes["scale_percent"]) / 100,
        "translateX": attributes["shift_x_percent"],
        "translateY": attributes["shift_y_percent"],
        "flip": "horizontal" if attributes["mirrored"] == "yes" else "none",
    }
    for name, component in _COMPONENTS.items():
        variant = _UNDER_HIJAB if attributes[name] == COVERED else attributes[name]
        options[f"{component}Probability"] = 0 if variant == "none" else 100
        options[f"{component}Variant"] = [] if variant == "none" else [variant]
    svg = Avatar(_style(), options).to_string()
    # The pictures contain no text, so no fonts are loaded.
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=image_size, height=image_size, skip_system_fonts=True
        )
    )


def draw_sample(
    target: Path, *, per_class: int, image_size: int, seed: int, jobs: int = -1
) -> None:
    """Draw the sample into the empty directory `target`.

    Writes female/0000.png, ..., male/0000.png, ... and metadata.csv: each picture's path relative
    to `target`, and its attributes. A larger sample contains the smaller one of the same seed.

    Args:
        image_size: pixels a side.
        seed: random seed, from 0 up.
        jobs: number of processes, -1 for one a core; it changes no byte.

    Raises:
        FileExistsError: `target` already holds a sample.
    """
    for label in CLASSES:
        (target / label).mkdir()
    pictures = [(label, index) for label in CLASSES for index in range(per_class)]
    tasks = (
        joblib.delayed(_draw_chunk)(target, pictures[start : start + _CHUNK], image_size, seed)
        for start in range(0, len(pictures), _CHUNK)
    )
    table: list[dict[str, str | int]] = []
    parallel = joblib.Parallel(jobs, batch_size=1, return_as="generator")
    # A moving bar in a terminal, few lines in a log.
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(pictures), desc="draw", unit="image", mininterval=interval, ncols=80
    ) as bar:
        for rows in parallel(tasks):
            table += rows
            bar.update(len(rows))
    with (target / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _draw_chunk(
    target: Path, pictures: list[tuple[str, int]], image_size: int, seed: int
) -> list[dict[str, str | int]]:
    rows = []
    for label, index in pictures:
        attributes = draw_attributes(label, index, seed)
        name = f"{label}/{index:04}.png"
        (target / name).write_bytes(render(attributes, image_size))
        rows.append({"file": name, **attributes})
    return rows


def bayes_accuracy(attributes: Collection[str] | None = None) -> float:
    """Return the exact accuracy of the best classifier on balanced classes.

    It labels each combination of values by the class in which it is likelier. Combinations that
    look the same count as one. Nothing outside `SIGNAL` depends on the class.

    Args:
        attributes: attributes of `SIGNAL` that the classifier sees; None for all.
    """
    shares: dict[tuple[str, ...], list[float]] = {}
    for values in itertools.product(*SIGNAL.values()):
        drawn = dict(zip(SIGNAL, values, strict=True))
        seen = show(drawn)
        share = shares.setdefault(tuple(seen[name] for name in attributes or SIGNAL), [0.0, 0.0])
        for column in range(len(CLASSES)):
            share[column] += math.prod(
                SIGNAL[name][value][column] / 100 for name, value in drawn.items()
            )
    return math.fsum(max(share) for share in shares.values()) / len(CLASSES)


def describe() -> str:
    """Return the distributions and the Bayes accuracy as Markdown."""
    lines = []
    for name, values in SIGNAL.items():
        lines += [f"| {name} | female % | male % |", "|---|---:|---:|"]
        lines += [f"| {value} | {female} | {male} |" for value, (female, male) in values.items()]
        lines.append("")
    lines += ["| drawn alike for both | from |", "|---|---|"]
    lines += [f"| {name} | {', '.join(options)} |" for name, options in NUISANCE.items()]
    lines += [f"| {name} | {first} to {last} |" for name, (first, last) in PLACEMENT.items()]
    lines += ["", "| a classifier that sees | is right at best |", "|---|---:|"]
    lines += [f"| {name} | {bayes_accuracy([name]):.4f} |" for name in SIGNAL]
    lines.append(f"| hair and facial_hair | {bayes_accuracy(['hair', 'facial_hair']):.4f} |")
    lines.append(f"| all four (the Bayes accuracy) | {bayes_accuracy():.4f} |")
    return "\n".join(lines)


def contact_sheet(path: Path) -> None:
    """Write a PNG of the first pictures: two rows of female, then two of male."""
    columns, size, seed = 12, 80, 42
    sheet = Image.new("RGB", (columns * size, 4 * size))
    for row in range(4):
        for column in range(columns):
            label, index = CLASSES[row // 2], row % 2 * columns + column
            with Image.open(io.BytesIO(render(draw_attributes(label, index, seed), size))) as face:
                sheet.paste(face.convert("RGB"), (column * size, row * size))
    sheet.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print what the sample is drawn from.")
    parser.add_argument("--contact-sheet", type=Path, help="write a PNG of pictures instead")
    arguments = parser.parse_args()
    if arguments.contact_sheet:
        contact_sheet(arguments.contact_sheet)
    else:
        print(describe())
