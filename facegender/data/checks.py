"""Checks of the data: faulty images, duplicates, and leaks between splits.

Each check has a policy: `drop` leaves the images out, `fail` stops and names them, and some checks
may `keep` them, copies in the same split. Images that are left out are logged, counted in
metrics/data.json and listed, with reasons, in data/splits/dropped.csv.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd

from facegender.data.face_table import missed_by_group
from facegender.data.fingerprint_store import Fingerprints, fingerprint_images
from facegender.data.near_duplicates import find_near_duplicates
from facegender.data.parallel_tasks import Where
from facegender.data.similar_pictures import MOST
from facegender.data.splits import (
    find_leaks,
    group_by_subject,
    split_at_random,
    split_by_folder,
)
from facegender.errors import UserError, listed
from facegender.labels import LABELS, NAMES
from facegender.params import FACE_CHECKS, Data, Split

# The study's images by label, before it divided its training split.
STUDY_COUNTS = {
    "train": {"female": 1225, "male": 1358},
    "test": {"female": 348, "male": 754},
}
# Widest range of a colour channel, of 255, at which an image counts as one colour.
MAX_CONSTANT_CONTRAST = 8
# The checks that metrics/data.json lists, in the order in which they run.
CHECKS = (
    "too_small",
    "extreme_shape",
    "constant",
    *FACE_CHECKS,
    "both_labels",
    "leakage",
    "exact_duplicates",
    "near_duplicates",
)

_SHOWN = 20  # names in metrics/data.json
_log = logging.getLogger(__name__)


@dataclass
class Findings:
    """Findings of the checks so far, and the action for each.

    Attributes:
        policies: `drop`, `keep` or `fail`, by check.
        reasons: reasons by check and path; `invalid` holds files that are not images.
        without_subject: number of images in the splits without a value of `split.group_by`; None if
            it is null.
        largest_subject: number of images in the largest subject; None likewise.
        missed: result of `missed_by_group`, for the images in which faces are expected.
        groups: by path, the group of images that share a split: one picture or subject.
        crowded: images that resemble more others than were compared with them.
    """

    policies: Mapping[str, str]
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    without_subject: int | None = None
    largest_subject: int | None = None
    missed: dict = field(default_factory=dict)
    groups: pd.Series = field(default_factory=lambda: pd.Series(dtype=str))
    crowded: list[str] = field(default_factory=list)

    def add(self, check: str, reasons: Mapping[str, str]) -> None:
        """Record and log what a check found. Raises UserError if its policy is to fail."""
        if not reasons:
            return
        shown = listed(reasons)
        policy = self.policies.get(check, "drop")
        if policy == "fail":
            raise UserError(
                f"The check {check} finds {len(reasons)} image(s), and data.checks.{check} is "
                f"fail: {shown}. List them in the file that data.exclude names, or set it to drop."
            )
        done = "left out" if policy == "drop" else "kept"
        _log.warning("%s: %d image(s) are %s: %s", check, len(reasons), done, shown)
        self.reasons[check] = dict(reasons)

    def report(self) -> dict[str, Any]:
        """Return, by check, its policy, how many images it found, and the first of them."""
        return {
            check: {
                "policy": self.policies[check],
                "count": len(self.reasons.get(check, {})),
                "images": list(self.reasons.get(check, {}))[:_SHOWN],
            }
            for check in CHECKS
            if check in self.policies
        }

    def summary(self) -> dict[str, Any]:
        """Return what metrics/data.json holds about the checks."""
        found = self.reasons
        subjects = {
            "without_subject": self.without_subject,
            "largest_subject": self.largest_subject,
        }
        return {
            **{name: count for name, count in subjects.items() if count is not None},
            "checks": self.report(),
            # A copy that is kept can be both.
            "duplicates": len(
                {path for kind in ("exact", "near") for path in found.get(f"{kind}_duplicates", ())}
            ),
            "not_all_compared": {"count": len(self.crowded), "images": self.crowded[:_SHOWN]},
            "under_both_labels": list(found.get("both_labels", ())),
            "invalid": [
                {"path": path, "reason": reason}
                for path, reason in found.get("invalid", {}).items()
            ],
        }

    def table(self) -> pd.DataFrame:
        """Return the images that are left out: columns `path`, `check` and `reason`."""
        rows = [
            (path, check, reason)
            for check, reasons in self.reasons.items()
            if self.policies.get(check, "drop") == "drop"
            for path, reason in reasons.items()
        ]
        return pd.DataFrame(rows, columns=["path", "check", "reason"])


def clean(
    manifest: pd.DataFrame,
    raw: Path,
    data: Data,
    split: Split,
    faces: pd.DataFrame | None = None,
    scratch: Path | None = None,
    **where: Unpack[Where],
) -> tuple[dict[str, pd.DataFrame], Findings]:
    """Check the images of a manifest, divide them and drop duplicates.

    Args:
        manifest: columns `path` (relative to `raw`), `label`, `sha256` and any others.
        faces: return value of `face_table.find_all_faces`, or None to judge whole images.
        scratch: directory for temporary files, as in `fingerprint_images`.
        where: arguments of `parallel_tasks.run_tasks`.

    Returns:
        The manifests of `train`, `validation` and `test`, and the findings.

    Raises:
        UserError: a check whose policy is `fail` found something, too many images are left out or
            too few are left, or they cannot be divided.
    """
    policies = data.checks.model_dump()
    if faces is None:
        policies = {name: policies[name] for name in policies if name not in FACE_CHECKS}
    elif "bad_box" not in faces:
        del policies["bad_box"]
    findings = Findings(policies)
    total = len(manifest)
    manifest, fingerprints = check_images(
        manifest,
        fingerprint_images(manifest, raw, scratch=scratch, **where),
        findings,
        min_side=data.min_side,
        max_aspect_ratio=data.max_aspect_ratio,
    )
    if faces is not None:
        findings.missed = missed_by_group(manifest, faces)
        kept = check_faces(manifest, faces, findings)
        fingerprints = fingerprints.take(np.flatnonzero(kept))
        manifest = manifest[kept].reset_index(drop=True)
    duplicate_groups = find_duplicate_groups(manifest, fingerprints, findings)
    sizes = pd.Series(fingerprints.measures[:, :2].prod(1, dtype=np.int64), manifest["path"])
    manifest = check_labels(manifest, duplicate_groups, findings, min_per_class=data.min_per_class)
    subjects = None
    if split.group_by:
        subjects = group_by_subject(manifest, duplicate_groups, split.group_by)
        findings.largest_subject = int(subjects.value_counts().iloc[0])
    findings.groups = duplicate_groups if subjects is None else subjects
    options: dict[str, Any] = {
        "validation_fraction": split.validation_fraction,
        "seed": split.seed,
        "duplicate_groups": duplicate_groups,
        "subjects": subjects,
    }
    if split.predefined:
        findings.add("leakage", find_leaks(manifest, duplicate_groups, subjects))
        splits = split_by_folder(manifest, **options)
    else:
        splits = split_at_random(manifest, test_fraction=split.test_fraction, **options)
    splits = drop_duplicates(splits, duplicate_groups, sizes, findings)
    check_dropped(splits, total, findings, max_fraction=data.max_dropped_fraction)
    if split.group_by:
        left = pd.concat(splits.values())
        findings.without_subject = int(left[split.group_by].isna().sum())
    return splits, findings


def check_images(
    manifest: pd.DataFrame,
    fingerprints: Fingerprints,
    findings: Findings,
    *,
    min_side: int,
    max_aspect_ratio: float,
) -> tuple[pd.DataFrame, Fingerprints]:
    """Leave out files that are not images, and images that can show no face.

    Args:
        manifest: column `path` and any others.
        fingerprints: fingerprints of its rows, from `fingerprint_images`.
        min_side: pixels of the shorter side.
        max_aspect_ratio: largest ratio of the longer side to the shorter.

    Returns:
        The remaining rows and their fingerprints.

    Raises:
        UserError: a check whose policy is `fail` found something.
    """
    paths = manifest["path"].to_numpy()
    findings.add("invalid", {paths[row]: why for row, why in fingerprints.reasons.items()})
    left = np.ones(len(paths), bool)
    left[list(fingerprints.reasons)] = False
    width, height, contrast = fingerprints.measures.T
    least, most = np.minimum(width, height), np.maximum(width, height)
    size = "has {}x{} pixels, "
    for check, faulty, reason in (
        ("too_small", least < min_side, f"{size}fewer than {min_side} on a side"),
        (
            "extreme_shape",
            most > max_aspect_ratio * least,
            f"{size}more than {max_aspect_ratio:g} to 1",
        ),
        ("constant", contrast <= MAX_CONSTANT_CONTRAST, "has one colour"),
    ):
        rows = np.flatnonzero(left & faulty)
        findings.add(check, {paths[row]: reason.format(width[row], height[row]) for row in rows})
        left[rows] = False
    kept = np.flatnonzero(left)
    return manifest.iloc[kept].reset_index(drop=True), fingerprints.take(kept)


def check_faces(manifest: pd.DataFrame, faces: pd.DataFrame, findings: Findings) -> pd.Series:
    """Record the images with no face, several faces or a bad box.

    Args:
        manifest: column `path` and any others.
        faces: return value of `face_table.find_all_faces`.

    Returns:
        bool for each row of the manifest: whether its image stays.

    Raises:
        UserError: a check whose policy is `fail` found something.
    """
    counts = dict(zip(faces["path"], faces["faces"], strict=True))
    left = list(manifest["path"])
    found = {
        "no_face": {path: "shows no face" for path in left if counts[path] == 0},
        "several_faces": {path: f"shows {counts[path]} faces" for path in left if counts[path] > 1},
    }
    if "bad_box" in faces:
        found["bad_box"] = faces.set_index("path")["bad_box"].dropna().to_dict()
    for check, reasons in found.items():
        findings.add(check, {path: reasons[path] for path in left if path in reasons})
        if findings.policies.get(check) == "drop":
            left = [path for path in left if path not in reasons]
    return manifest["path"].isin(left)


def find_duplicate_groups(
    manifest: pd.DataFrame, fingerprints: Fingerprints, findings: Findings
) -> pd.Series:
    """Find the files that show the same picture, byte for byte or nearly, whatever their names.

    Images that were not compared with all that they resemble are recorded in the findings.

    Returns:
        By path, the smallest SHA-256 of the file's group.
    """
    # One file for each content, in the order of digests.
    unique, distinct = np.unique(manifest["sha256"].to_numpy(dtype=str), return_index=True)
    digests = unique.tolist()
    group = dict(zip(digests, digests, strict=True))
    found = find_near_duplicates(fingerprints.thumbnails.take(distinct))
    for members in found.groups:
        group |= {digests[member]: digests[members[0]] for member in members}
    if found.crowded:
        findings.crowded = [manifest["path"].iloc[distinct[index]] for index in found.crowded]
        _log.warning(
            "%d image(s) resemble more than %d others, and only the most likely of these were "
            "compared, so near duplicates may be missed: %s",
            *(len(findings.crowded), MOST, ", ".join(findings.crowded[:5])),
        )
    return pd.Series(
        manifest["sha256"].map(group).to_numpy(), index=pd.Index(manifest["path"]), dtype=str
    )


def check_labels(
    manifest: pd.DataFrame, duplicate_groups: pd.Series, findings: Findings, *, min_per_class: int
) -> pd.DataFrame:
    """Of a picture that has both labels, leave out the files with the rarer label.

    If both labels are as frequent, leave out all files of the picture.

    Args:
        manifest: columns `path`, `label` and any others.
        min_per_class: smallest number of remaining images of each label.

    Raises:
        UserError: such pictures are found and the policy is `fail`, or too few images remain.
    """
    group = manifest["path"].map(duplicate_groups)
    both = manifest.groupby(group)["label"].transform("nunique") > 1
    reasons: dict[str, str] = {}
    for _, members in manifest[both].groupby(group[both]):
        for label, name in NAMES.items():
            has_label = members["label"] == label
            files, others = members["path"][has_label], members["path"][~has_label]
            if len(files) > len(others):
                continue
            more = f" (as {len(others)} files are)" if len(files) < len(others) else ""
            why = f"is labelled {name}, and {others.iloc[0]!r} is the same picture{more}"
            reasons |= dict.fromkeys(files, why)
    findings.add("both_labels", dict(sorted(reasons.items())))
    rest = manifest[~manifest["path"].isin(reasons)].reset_index(drop=True)
    for name, label in LABELS.items():
        left = int((rest["label"] == label).sum())
        if left < min_per_class:
            lost = ", ".join(f"{check} {len(found)}" for check, found in findings.reasons.items())
            raise UserError(
                f"{left} usable image(s) are labelled {name}, and data.min_per_class is "
                f"{min_per_class}. Left out are, of both labels: {lost or 'none'}. Add images, or "
                "lower the minimum."
            )
    return rest


def drop_duplicates(
    splits: Mapping[str, pd.DataFrame],
    duplicate_groups: pd.Series,
    sizes: pd.Series,
    findings: Findings,
) -> dict[str, pd.DataFrame]:
    """Keep the largest image of each group, or all if the policy is `keep`.

    Args:
        splits: manifests, with each duplicate group in one of them.
        sizes: pixels of each image, by path.

    Raises:
        UserError: duplicates are found and the policy is `fail`.
    """
    exact: dict[str, str] = {}
    near: dict[str, str] = {}
    for images in splits.values():
        ranked = images.assign(
            size=images["path"].map(sizes), group=images["path"].map(duplicate_groups)
        ).sort_values(["size", "sha256", "path"], ascending=[False, True, True])
        copies = ranked.duplicated("sha256")
        first = ranked[~copies]
        kept = first.set_index("sha256")["path"]
        best = first.drop_duplicates("group").set_index("group")["path"]
        # Byte copies of a near duplicate are near duplicates, too.
        nearly = ranked["sha256"].isin(first.loc[first.duplicated("group"), "sha256"])
        if findings.policies["exact_duplicates"] == "drop":
            nearly &= ~copies
        for path, group in ranked.loc[nearly, ["path", "group"]].to_numpy():
            near[path] = f"shows nearly what {best[group]!r} shows"
        for path, sha256 in ranked.loc[copies, ["path", "sha256"]].to_numpy():
            exact[path] = f"is a copy of {kept[sha256]!r}"
    if findings.policies["near_duplicates"] == "drop":
        exact = {path: reason for path, reason in exact.items() if path not in near}
    findings.add("exact_duplicates", dict(sorted(exact.items())))
    findings.add("near_duplicates", dict(sorted(near.items())))
    gone: set[str] = set()
    for check, reasons in (("exact_duplicates", exact), ("near_duplicates", near)):
        if findings.policies[check] == "drop":
            gone |= set(reasons)
    return {
        name: images[~images["path"].isin(gone)].reset_index(drop=True)
        for name, images in splits.items()
    }


def check_dropped(
    splits: Mapping[str, pd.DataFrame], total: int, findings: Findings, *, max_fraction: float
) -> None:
    """Raise UserError if the checks leave out more than a share of the images.

    Args:
        total: number of images before the checks.
        max_fraction: largest share of them that may be left out.
    """
    dropped = total - sum(map(len, splits.values()))
    if dropped > max_fraction * total:
        counts = findings.table()["check"].value_counts(sort=False)
        by_check = ", ".join(f"{check} {count}" for check, count in counts.items())
        raise UserError(
            f"The checks leave out {dropped} of {total} images, more than "
            f"data.max_dropped_fraction = {max_fraction:g} allows: {by_check}. The log above names "
            "some of each. List what is wrong in the file that data.exclude names, set the check "
            "to keep or fail, or raise the limit."
        )


def class_balance(splits: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, float]]:
    """Return the share of female labels in train and validation, in test, and in the study."""
    ours = {"train": pd.concat([splits["train"], splits["validation"]]), "test": splits["test"]}
    balance: dict[str, dict[str, float]] = {}
    for name, images in ours.items():
        study = STUDY_COUNTS[name]
        row = balance[name] = {
            "images": len(images),
            "female": round(float((images["label"] == LABELS["female"]).mean()), 4),
            "study_images": sum(study.values()),
            "study_female": round(study["female"] / sum(study.values()), 4),
        }
        _log.info(
            "%s: %d images, %.1f %% female (the study's: %d, %.1f %%)",
            "train and validation" if name == "train" else name,
            *(row["images"], 100 * row["female"]),
            *(row["study_images"], 100 * row["study_female"]),
        )
    return balance
