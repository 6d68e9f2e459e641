"""Fetches images from the built-in sample, Kaggle, or a folder or archive on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facegender.data.sources.archive import ArchiveLimits
from facegender.data.sources.raw_directory import content_digest, replace_directory
from facegender.params import Dataset, FolderDataset, KaggleDataset, SampleDataset


def fetch_dataset(
    dataset: Dataset,
    target: Path,
    *,
    limits: ArchiveLimits,
    cache: Path,
    root: Path,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill the directory `target` with a dataset's images; on failure, it does not change.

    Args:
        cache: directory for partial downloads.
        root: the repository, where a relative path starts.
        known: result of an earlier call: the same version of a Kaggle dataset must have the same
            bytes.

    Returns:
        Facts for JSON: `source`, `version`, number of `files`, the `sha256` of the content, and
        `left_out` and `other_files`, if any.

    Raises:
        UserError: the source is unavailable, or has changed.
    """
    with replace_directory(target) as temporary:
        facts = _fill(dataset, temporary, limits, cache, root, known or {})
        files, sha256 = content_digest(temporary)
    return {"source": dataset.source, **facts, "files": files, "sha256": sha256}


def _fill(
    dataset: Dataset,
    target: Path,
    limits: ArchiveLimits,
    cache: Path,
    root: Path,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    # Imported only when used, so that a change in one source does not affect another.
    match dataset:
        case SampleDataset():
            from facegender.data.sources import sample

            sample.draw_sample(
                target,
                per_class=dataset.per_class,
                image_size=dataset.image_size,
                seed=dataset.seed,
            )
            return {"version": sample.version()}
        case FolderDataset():
            from facegender.data.sources.folder import copy_folder, summarize

            left_out = copy_folder(dataset.path_from(root), target, limits)
            return {"version": Path(dataset.path).name} | summarize(left_out)
        case KaggleDataset():
            from facegender.data.sources.folder import name_rest, summarize
            from facegender.data.sources.kaggle import download_kaggle

            same = known.get("slug") == dataset.slug and dataset.version in {
                None,
                known.get("version"),
            }
            got = download_kaggle(
                dataset.slug,
                dataset.version,
                target,
                limits,
                cache=cache,
                expected_sha256=known.get("archive_sha256") if same else None,
                expected_version=known.get("version") if same else None,
            )
            return {
                "slug": got.slug,
                "version": got.version,
                "archive_sha256": got.archive_sha256,
                **summarize(name_rest(target, got.slug)),
            }
