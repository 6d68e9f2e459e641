"""The built-in sample: cartoon faces whose labels are stipulated by the distributions below.

The pictures are drawn by DiceBear's `avataaars` style. Their labels teach and test the pipeline;
they say nothing about people. `python -m facegender.datasets.sample` prints the distributions and
the accuracy of the best possible classifier (docs/sample-data.md).
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version as package_version
from importlib.resources import files
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import resvg_py
from dicebear import Avatar, Style
from tqdm import tqdm

CLASSES = ("female", "male")

# Each value with its probability in percent for (female, male). Given the class, the attributes
# are independent. Every class has every value, so no attribute gives the label away alone.
SIGNAL: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "hair": {
        # worn long by most of one class
        "straight01": (20, 0.2),
        "straight02": (16, 0.2),
        "longButNotTooLong": (15, 0.2),
        "curvy": (14, 0.2),
        "bigHair": (10, 0.2),
        "miaWallace": (10, 0.2),
        "bob": (8.5, 0.3),
        # worn short by most of the other
        "shortFlat": (0.3, 24),
        "shortRound": (0.2, 20),
        "shortWaved": (0.2, 18),
        "theCaesar": (0.2, 15),
        "sides": (0.2, 10),
        "shortCurly": (0.2, 7),
        # worn by both
        "dreads": (0.7, 0.5),
        "hijab": (2.7, 0.3),
        "turban": (0.3, 2.2),
        "winterHat1": (0.8, 0.7),
        "hat": (0.7, 0.8),
    },
    "facial_hair": {
        "none": (97.5, 25),
        "beardLight": (0.8, 25),
        "beardMedium": (0.7, 26),
        "beardMajestic": (0.5, 14),
        "moustacheFancy": (0.5, 10),
    },
    "accessories": {
        "none": (70, 72),
        "round": (12, 5),
        "prescription01": (6, 6),
        "prescription02": (4, 9),
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

# Drawn alike for both classes, uniformly: what a model must learn to look past.
NUISANCE: Mapping[str, tuple[str, ...]] = {
    "skin_color": ("614335", "ae5d29", "d08b5b", "edb98a", "ffdbb4"),
    "hair_color": ("2c1b18", "4a312c", "724133", "a55728", "b58143", "d6b370", "e8e1e1"),
    "clothing_color": ("262e33", "25557c", "3c4f5c", "5199e4", "929598", "a7ffc4", "ff5c5c"),
    "background_color": ("b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf", "e8e8e8"),
    "eyes": ("default", "happy", "side"),
    "eyebrows": ("default", "defaultNatural", "flatNatural", "raisedExcitedNatural"),
    "mouth": ("default", "serious", "smile", "twinkle"),
}

HEADWEAR = frozenset({"hat", "hijab", "turban", "winterHat1"})

_CHUNK = 20  # pictures a task
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
    """Return the versions of the packages that decide the pictures' bytes."""
    names = ("dicebear-core", "dicebear-styles", "resvg-py", "numpy")
    return ", ".join(f"{name} {package_version(name)}" for name in names)


@cache
def _style() -> Style:
    source = files("dicebear_styles").joinpath("avataaars.json")
    return Style(json.loads(source.read_text("utf-8")))


def check_variants(choices: Mapping[str, Any] = SIGNAL | NUISANCE) -> None:
    """Check every variant against the style, which would silently draw nothing for a wrong name.

    Raises:
        ValueError: a component has no such variant.
    """
    source = files("dicebear_styles").joinpath("avataaars.json")
    components = json.loads(source.read_text("utf-8"))["components"]
    for attribute, component in _COMPONENTS.items():
        for variant in choices.get(attribute, ()):
            if variant != "none" and variant not in components[component]["variants"]:
                raise ValueError(f"avataaars has no {component} {variant!r}")


def draw_attributes(label: str, index: int, seed: int) -> dict[str, Any]:
    """Return the attributes of one picture, which depend on (seed, label, index) alone.

    Args:
        label: female or male.
        index: number of the picture within its class.
        seed: source of chance.
    """
    column = CLASSES.index(label)
    generator = np.random.default_rng([seed, column, index])
    drawn: dict[str, Any] = {}
    for name, values in SIGNAL.items():
        weights = np.array([pair[column] for pair in values.values()])
        drawn[name] = str(generator.choice(list(values), p=weights / weights.sum()))
    for name, options in NUISANCE.items():
        drawn[name] = str(generator.choice(options))
    drawn["headwear"] = "yes" if drawn["hair"] in HEADWEAR else "no"
    # Where and how large the face is: whole numbers, so that the CSV holds them exactly.
    drawn["rotate"] = int(generator.integers(-12, 13))
    drawn["scale"] = int(generator.integers(85, 106))
    drawn["shift_x"] = int(generator.integers(-8, 9))
    drawn["shift_y"] = int(generator.integers(-4, 7))
    drawn["mirrored"] = "yes" if generator.integers(2) else "no"
    return drawn


def render(attributes: Mapping[str, Any], image_size: int) -> bytes:
    """Return the picture of `attributes` as PNG, `image_size` pixels a side."""
    options: dict[str, Any] = {
        # Fixes what no option below does.
        "seed": "facegender",
        "topProbability": 100,
        "skinColor": [attributes["skin_color"]],
        "hairColor": [attributes["hair_color"]],
        "facialHairColor": [attributes["hair_color"]],
        "hatColor": [attributes["clothing_color"]],
        "clothesColor": [attributes["clothing_color"]],
        "accessoriesColor": ["262e33"],
        "backgroundColor": [attributes["background_color"]],
        "rotate": attributes["rotate"],
        "scale": attributes["scale"] / 100,
        "translateX": attributes["shift_x"],
        "translateY": attributes["shift_y"],
        "flip": "horizontal" if attributes["mirrored"] == "yes" else "none",
    }
    for name, component in _COMPONENTS.items():
        value = attributes[name]
        options[f"{component}Variant"] = [] if value == "none" else [value]
        if name in {"facial_hair", "accessories"}:
            options[f"{component}Probability"] = 0 if value == "none" else 100
    svg = Avatar(_style(), options).to_string()
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=image_size, height=image_size))


def draw_sample(
    target: Path, *, per_class: int, image_size: int, seed: int, jobs: int = -1
) -> None:
    """Draw the sample into the empty directory `target`.

    Makes female/0000.png, ..., male/0000.png, ... and metadata.csv with each picture's attributes.
    A larger sample holds the smaller one of the same seed.

    Args:
        target: existing directory.
        per_class: pictures of each class.
        image_size: pixels a side.
        seed: source of chance.
        jobs: processes; -1 for one a core. Their number changes no byte.
    """
    check_variants()
    pictures = [(label, index) for label in CLASSES for index in range(per_class)]
    for label in CLASSES:
        (target / label).mkdir()
    tasks = (
        joblib.delayed(_draw)(target, pictures[start : start + _CHUNK], image_size, seed)
        for start in range(0, len(pictures), _CHUNK)
    )
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(pictures), desc="draw", unit="image", mininterval=1) as bar:
        for drawn in joblib.Parallel(jobs, return_as="generator")(tasks):
            rows += drawn
            bar.update(len(drawn))
    pd.DataFrame(rows).to_csv(target / "metadata.csv", index=False, lineterminator="\n")


def _draw(
    target: Path, pictures: list[tuple[str, int]], image_size: int, seed: int
) -> list[dict[str, Any]]:
    rows = []
    for label, index in pictures:
        attributes = draw_attributes(label, index, seed)
        name = f"{label}/{index:04}.png"
        (target / name).write_bytes(render(attributes, image_size))
        rows.append({"file": name, **attributes})
    return rows


def bayes_accuracy(attributes: tuple[str, ...] = tuple(SIGNAL)) -> float:
    """Return the accuracy of the best classifier that sees `attributes`, on balanced classes.

    Exact: for each combination of values, the best guess is the class under which it is likelier.
    """
    shares = [_shares(name) for name in attributes]
    total = 0.0
    for combination in itertools.product(*shares):
        total += max(math.prod(pair[column] for pair in combination) for column in (0, 1)) / 2
    return total


def _shares(name: str) -> list[tuple[float, float]]:
    pairs = list(SIGNAL[name].values())
    sums = [math.fsum(pair[column] for pair in pairs) for column in (0, 1)]
    return [(female / sums[0], male / sums[1]) for female, male in pairs]


def describe() -> str:
    """Return the distributions and the Bayes accuracy as Markdown."""
    lines = []
    for name, values in SIGNAL.items():
        lines += [f"| {name} | female % | male % |", "|---|---:|---:|"]
        lines += [f"| {value} | {female} | {male} |" for value, (female, male) in values.items()]
        lines.append("")
    lines += ["| drawn alike for both | from |", "|---|---|"]
    lines += [f"| {name} | {', '.join(options)} |" for name, options in NUISANCE.items()]
    lines += ["", "| a classifier that sees | is right at best |", "|---|---:|"]
    for name in SIGNAL:
        lines.append(f"| {name} alone | {bayes_accuracy((name,)):.4f} |")
    lines.append(f"| all four (the Bayes accuracy) | {bayes_accuracy():.4f} |")
    return "\n".join(lines)


def contact_sheet(path: Path, *, columns: int = 12, size: int = 80, seed: int = 42) -> None:
    """Write a PNG with a row of female and a row of male pictures, twice."""
    import io

    from PIL import Image

    sheet = Image.new("RGB", (columns * size, 4 * size))
    for row, (label, start) in enumerate(
        [("female", 0), ("female", columns), ("male", 0), ("male", columns)]
    ):
        for column in range(columns):
            png = render(draw_attributes(label, start + column, seed), size)
            sheet.paste(Image.open(io.BytesIO(png)).convert("RGB"), (column * size, row * size))
    sheet.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print what the sample is drawn from.")
    parser.add_argument("--contact-sheet", type=Path, help="write a PNG of pictures instead")
    arguments = parser.parse_args()
    if arguments.contact_sheet:
        contact_sheet(arguments.contact_sheet)
    else:
        print(describe())
