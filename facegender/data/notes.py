"""Notes on images that are left out while labels are read, before the checks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from facegender.data.image_finder import is_named_exactly
from facegender.errors import UserError, listed

_SHOWN = 20  # names in metrics/data.json
_log = logging.getLogger(__name__)


@dataclass
class Notes:
    """Images that were left out, and rows of CSVs that were not used, with reasons.

    Attributes:
        excluded: reason by path of the images that `data.exclude` names.
        unmatched_digests: digests in `data.exclude` that match no image.
        unlabelled: reason by path of the images without a label.
        ignored: number of images that `ignore` leaves out.
        skipped_tables: reason by CSV that is skipped.
        unmatched_rows: number of rows that match no image, with an example of each side, by CSV.
        ambiguous_rows: number of rows that fit several images, with an example, by CSV.
        renamed_rows: number of rows whose name differs from the file's, with an example, by CSV.
        other_labels: number of images whose label a metadata column, or the class folder,
            contradicts, with the first, by column.
    """

    excluded: dict[str, str] = field(default_factory=dict)
    unmatched_digests: list[str] = field(default_factory=list)
    unlabelled: dict[str, str] = field(default_factory=dict)
    ignored: int = 0
    skipped_tables: dict[str, str] = field(default_factory=dict)
    unmatched_rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    ambiguous_rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    renamed_rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    other_labels: dict[str, dict[str, Any]] = field(default_factory=dict)

    def skip_table(self, table: str, why: str) -> None:
        """Note that a table is skipped."""
        _log.warning("%s is skipped: %s", table, why)
        self.skipped_tables[table] = why

    def match_rows(
        self, table: str, files: Sequence[str], found: Sequence[Sequence[str]], image: str | None
    ) -> None:
        """Note which rows of a table match no image, several, or one with another name.

        Args:
            files: name in each row.
            found: images that fit each row.
            image: path of an image, as an example.
        """
        rows = len(files)
        matches = list(zip(files, found, strict=True))
        if unmatched := [file for file, images in matches if not images]:
            self.unmatched_rows[table] = {
                "rows": rows,
                "unmatched": len(unmatched),
                "first": unmatched[0],
                "an_image": image,
            }
            _log.warning(
                "%s: %d of %d rows match no image; the first is %r, and an image is %r",
                *(table, len(unmatched), rows, unmatched[0], image),
            )
        if several := [(file, images) for file, images in matches if len(images) > 1]:
            first, fitting = several[0]
            self.ambiguous_rows[table] = {
                "rows": rows,
                "ambiguous": len(several),
                "first": first,
                "fitting": len(fitting),
                "images": list(fitting[:5]),
            }
            _log.warning(
                "%s: %d of %d rows fit several images and are left out; the first is %r, and fits "
                "%s",
                *(table, len(several), rows, first, ", ".join(fitting[:5])),
            )
        if renamed := [
            (file, images[0])
            for file, images in matches
            if len(images) == 1 and not is_named_exactly(images[0], file)
        ]:
            first, image = renamed[0]
            self.renamed_rows[table] = {
                "rows": rows,
                "renamed": len(renamed),
                "first": first,
                "image": image,
            }
            _log.warning(
                "%s: %d of %d rows name an image by another case, Unicode form, ending or folder; "
                "the first is %r, for %r",
                *(table, len(renamed), rows, first, image),
            )

    def limit_unlabelled(self, fraction: float, total: int) -> None:
        """Log images without a label. Raises UserError if they exceed a `fraction` of `total`."""
        if not self.unlabelled:
            return
        shown = listed(self.unlabelled)
        if len(self.unlabelled) > fraction * total:
            rows = "".join(
                f" In {table}, {row['unmatched']} of {row['rows']} rows match no image, such as "
                f"{row['first']!r}."
                for table, row in self.unmatched_rows.items()
            )
            raise UserError(
                f"{len(self.unlabelled)} of {total} images have no label, more than "
                f"data.max_invalid_fraction = {fraction} allows: {shown}.{rows} Correct "
                "dataset.labels, list the images in the file that data.exclude names, or raise the "
                "limit."
            )
        _log.warning("%d image(s) without a label are left out: %s", len(self.unlabelled), shown)

    def table(self) -> pd.DataFrame:
        """Return the images that are left out: columns `path`, `check` and `reason`."""
        kinds = {"excluded": self.excluded, "unlabelled": self.unlabelled}
        rows = [(path, kind, why) for kind, found in kinds.items() for path, why in found.items()]
        return pd.DataFrame(rows, columns=["path", "check", "reason"])

    def summary(self) -> dict[str, Any]:
        """Return what metrics/data.json holds about these notes."""
        return {
            "excluded": {
                **_counted(self.excluded),
                "digests_without_image": self.unmatched_digests[:_SHOWN],
            },
            "unlabelled": _counted(self.unlabelled),
            "ignored": self.ignored,
            "metadata": {
                "skipped_tables": self.skipped_tables,
                "unmatched_rows": self.unmatched_rows,
                "ambiguous_rows": self.ambiguous_rows,
                "renamed_rows": self.renamed_rows,
                **({"other_labels": self.other_labels} if self.other_labels else {}),
            },
        }


def _counted(reasons: dict[str, str]) -> dict[str, Any]:
    return {"count": len(reasons), "images": list(reasons)[:_SHOWN]}
