import pytest

from facegender.data.invalid_limit import check_invalid
from facegender.errors import UserError


def test_the_limit_is_a_share_of_all_files() -> None:
    check_invalid({"a.jpg": "empty", "b.jpg": "empty"}, 100, 0.02)
    with pytest.raises(UserError, match=r"2 of 99 images .* a\.jpg: empty; b\.jpg: empty"):
        check_invalid({"a.jpg": "empty", "b.jpg": "empty"}, 99, 0.02)
