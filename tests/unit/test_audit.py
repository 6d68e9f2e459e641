import json

import pytest

from tools.audit import ACCEPTED, judge

KNOWN = {"id": "GHSA-x", "aliases": list(ACCEPTED), "fix_versions": []}
BAD = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}


def report(**packages: list[dict] | None) -> str:
    items = [
        {"name": name, "skip_reason": "not found"}
        if vulnerabilities is None
        else {"name": name, "version": "1.0", "vulns": vulnerabilities}
        for name, vulnerabilities in packages.items()
    ]
    return json.dumps({"dependencies": items, "fixes": []})


@pytest.mark.parametrize("required", [True, False])
def test_nothing_but_what_is_accepted_passes(required: bool) -> None:
    code, words = judge(report(diskcache=[KNOWN], keras=[]), "", required=required)
    assert code == 0
    assert words.startswith("2 packages, no vulnerability")


@pytest.mark.parametrize("required", [True, False])
def test_a_vulnerability_fails(required: bool) -> None:
    code, words = judge(report(diskcache=[KNOWN], keras=[BAD], a=None), "", required=required)
    assert code == 1
    assert "keras 1.0: PYSEC-1, fixed in 2.0" in words
    assert "diskcache" not in words


@pytest.mark.parametrize(
    ("stdout", "stderr"),
    [
        ("", "ERROR:pip_audit._cli:Tip: your network may be blocking this service."),
        ("", "Traceback\nrequests.exceptions.ConnectionError: Max retries exceeded"),
        ("", "pip_audit._service.interface.ServiceError"),
        (report(diskcache=None, keras=None), ""),
        (report(diskcache=[KNOWN], keras=None), ""),
        (report(diskcache=[], keras=[]), ""),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_what_was_not_checked_is_said(stdout: str, stderr: str, required: bool) -> None:
    code, words = judge(stdout, stderr, required=required)
    assert code == int(required)
    assert words.startswith("SKIPPED, vulnerabilities are not known")


def test_other_failures_are_failures() -> None:
    code, words = judge("", "ERROR:pip_audit._cli:keras has no hash\n", required=False)
    assert (code, words) == (1, "FAILED: ERROR:pip_audit._cli:keras has no hash")
