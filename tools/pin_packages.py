"""Write conf/packages.yaml: the locked versions of the packages that decide the bytes of a result.

DVC watches these versions as parameters of the stages, so that an upgrade reruns what uses them.
"""

import re
import sys
from pathlib import Path

import yaml

# By the name that the code imports.
PACKAGES = {
    "PIL": "pillow",
    "ai_edge_litert": "ai-edge-litert",
    "cleanlab": "cleanlab",
    "dicebear": "dicebear-core",
    "keras": "keras",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "pandas": "pandas",
    "pillow_heif": "pillow-heif",
    "resvg_py": "resvg-py",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tensorflow": "tensorflow",
}
_HEAD = "# Versions in requirements.lock that decide results; written by `make lock`.\n"


def locked_versions(lock: str) -> dict[str, list[str]]:
    """Return the versions of PACKAGES in a lock file's text: one, or one per Python version."""
    return {
        name: re.findall(rf"^{name}==([^ ;\\]+)", lock, re.MULTILINE)
        for name in sorted(PACKAGES.values())
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(
        _HEAD + yaml.safe_dump(locked_versions(source.read_text()), default_flow_style=None)
    )
