"""Notes on images left out before the checks, for the log, metrics/data.json and dropped.csv."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from facegender.errors import UserError, listed

_SHOWN = 20  # names in metrics/data.json
_log = logging.getLogger(__name__)


@dataclass
class Notes:
    """Images that were left out while labels were read, and why.

    Attributes:
        excluded: the entry of `data.exclude` that names an image, by path.
        unmatched_digests: entries of `data.exclude` that name no image.
        unlabelled: why an image has no label, by path.
        ignored: images that `ignore` leaves out.
        skipped_tables: why a CSV is skipped, by CSV.
        unmatched_rows: number of rows that match no image, with an example of each side, by CSV.
    """

    excluded: dict[str, str] = field(default_factory=dict)
    unmatched_digests: list[str] = field(default_factory=list)
    unlabelled: dict[str, str] = field(default_factory=dict)
    ignored: int = 0
    skipped_tables: dict[str, str] = field(default_factory=dict)
    unmatched_rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def unmatched(self, table: str, files: Sequence[str], rows: int, image: str | None) -> None:
        """Note that rows of a table name files that are not among the images."""
        if not len(files):
            return
        _log.warning(
            "%s: %d of %d rows match no image; the first is %r, and an image is %r",
            table,
            len(files),
            rows,
            files[0],
            image,
        )
        self.unmatched_rows[table] = {
            "rows": rows,
            "unmatched": len(files),
            "first": str(files[0]),
            "an_image": image,
        }

    def limit_unlabelled(self, fraction: float, total: int) -> None:
        """Log the images without label.

        Raises:
            UserError: they are more than `fraction` of `total`.
        """
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
        _log.warning("%d image(s) without label are left out: %s", len(self.unlabelled), shown)

    def table(self) -> pd.DataFrame:
        """Return what is left out: columns `path`, `check` and `reason`."""
        kinds = {"excluded": self.excluded, "unlabelled": self.unlabelled}
        rows = [(path, kind, why) for kind, found in kinds.items() for path, why in found.items()]
        return pd.DataFrame(rows, columns=["path", "check", "reason"])

    def summary(self) -> dict[str, Any]:
        """Return what metrics/data.json says of this, ready for JSON."""
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
            },
        }


def _counted(reasons: dict[str, str]) -> dict[str, Any]:
    return {"count": len(reasons), "images": list(reasons)[:_SHOWN]}
