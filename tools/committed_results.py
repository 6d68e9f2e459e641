"""Check that the results committed at HEAD are those that its dvc.lock records: exit code 1."""

import sys
from pathlib import Path

from facegender.gate.freshness import edited_results

if __name__ == "__main__":
    if edited := edited_results(Path.cwd(), None, "HEAD"):
        sys.exit(
            f"error: Committed, but not what dvc.lock at HEAD records: {', '.join(edited)}. Run "
            "`dvc repro`, and commit its results and dvc.lock together."
        )
