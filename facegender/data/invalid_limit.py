"""The limit on images that cannot be decoded: `data.max_invalid_fraction`."""

from collections.abc import Mapping

from facegender.errors import UserError


def check_invalid(invalid: Mapping[str, str], total: int, most: float) -> None:
    """Check the share of images that cannot be decoded.

    Args:
        invalid: reasons by path.
        total: number of images before any check leaves one out.
        most: largest share, from 0 to 1.

    Raises:
        UserError: the share is larger.
    """
    if len(invalid) > most * total:
        shown = "; ".join(f"{path}: {reason}" for path, reason in list(invalid.items())[:10])
        raise UserError(
            f"{len(invalid)} of {total} images cannot be decoded, more than "
            f"data.max_invalid_fraction = {most} allows: {shown}. List them in the file that "
            "data.exclude names, or raise the limit."
        )
