"""Check the packages of requirements.lock for known vulnerabilities, with pip-audit.

The exit code is 1 if one is found that is not accepted below. If the list of vulnerabilities cannot
be reached, a message says so and the code is 0, or 1 with --required.
"""

import argparse
import json
import re
import subprocess
import sys

from tools.compose_params import ROOT

# Known vulnerabilities without a fix that we accept; SECURITY.md says why, and what to do.
ACCEPTED = {"CVE-2025-69872": "diskcache, which DVC needs, pickles its state"}

_UNREACHABLE = re.compile(
    r"Could not connect|not redirecting properly|network may be blocking|"
    r"(?:Connection|SSL|Proxy|HTTP|Service|JSONDecode)Error|Timeout"
)


def main() -> int:
    """Print known vulnerabilities and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="make audit", description=__doc__)
    parser.add_argument("--required", action="store_true", help="fail if nothing could be checked")
    args = parser.parse_args()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--requirement", "requirements.lock"),
            *("--disable-pip", "--require-hashes", "--format", "json"),
            *("--progress-spinner", "off"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    code, words = judge(done.stdout, done.stderr, required=args.required)
    print(f"audit: {words}")
    return code


def judge(stdout: str, stderr: str, *, required: bool) -> tuple[int, str]:
    """Return the exit code and a paragraph for what pip-audit printed."""
    try:
        packages = json.loads(stdout)["dependencies"]
    except ValueError:
        lines = stderr.strip().splitlines() or ["pip-audit printed nothing"]
        if not _UNREACHABLE.search(stderr):
            return 1, f"FAILED: {lines[-1]}"
        return _unchecked(f"the list of vulnerabilities cannot be reached ({lines[-1]})", required)

    skipped = [item["name"] for item in packages if "skip_reason" in item]
    found = [
        f"{item['name']} {item['version']}: {vulnerability['id']}, fixed in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version'}"
        for item in packages
        for vulnerability in item.get("vulns", [])
        if not ACCEPTED.keys() & {vulnerability["id"], *vulnerability["aliases"]}
    ]
    if found:
        return 1, "\n  ".join(["FAILED", *found])
    if skipped:
        # A mirror of PyPI that has only the packages answers like this.
        return _unchecked(f"{len(skipped)} of {len(packages)} packages are unknown there", required)
    if not any(item.get("vulns") for item in packages) and ACCEPTED:
        known = ", ".join(ACCEPTED)
        return _unchecked(
            f"the list does not even have {known}, so it may be empty; if that was fixed, remove "
            "it from ACCEPTED in tools/audit.py",
            required,
        )
    return 0, f"{len(packages)} packages, no vulnerability but those accepted in tools/audit.py"


def _unchecked(why: str, required: bool) -> tuple[int, str]:
    return int(required), f"SKIPPED, vulnerabilities are not known: {why}"


if __name__ == "__main__":
    sys.exit(main())
