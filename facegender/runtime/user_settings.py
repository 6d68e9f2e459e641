"""Settings of the user's other projects, which must neither change a result nor stop a stage.

Libraries read them from the environment and from files in the home directory. What TensorFlow,
Keras and Matplotlib read is set here before their import. For what Python, NumPy, SciPy and pandas
read when a stage starts, the process starts again. The number of cores is the machine's, so the
number of threads is not among them, except as TensorFlow's own variables set it.
"""

import locale
import os
import sys
from collections.abc import Mapping, MutableMapping

# Keeps the variables that decide numbers, to measure what they do (bench/reproducible.py).
KEEP = "FACEGENDER_KEEP_SETTINGS"

_BACKEND = "tensorflow"
_DECISIVE = ("TF_", "TF2_", "XLA_", "ONEDNN_", "DNNL_", "NVIDIA_TF32_OVERRIDE", "KERAS_")
# Workers of a training, memory, and logs; Terraform's variables.
_HARMLESS = (
    "KERAS_HOME",
    "TF_CLI_",
    "TF_CONFIG",
    "TF_CPP_",
    "TF_DATA_DIR",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_GPU_ALLOCATOR",
    "TF_INPUT",
    "TF_IN_AUTOMATION",
    "TF_LOG",
    "TF_VAR_",
    "TF_WORKSPACE",
)
# Read by Python, or by libraries that the stages import before they call anything here.
_EARLY = ("NPY_", "SCIPY_", "PANDAS_", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONSAFEPATH")


def drop_user_settings(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that decide numbers, and hide the user's files from the libraries.

    Returns:
        The names of the removed variables, sorted, to show the user.
    """
    # Values that this function and TensorFlow set themselves.
    for name, value in (("KERAS_BACKEND", _BACKEND), ("TF2_BEHAVIOR", "1")):
        if environment.get(name) == value:
            del environment[name]
    dropped = [] if environment.get(KEEP) else sorted(filter(_decides, environment))
    for name in dropped:
        del environment[name]
    environment["KERAS_BACKEND"] = _BACKEND
    # Keras reads keras.json there (floatx, epsilon, image_data_format), and caches weights there.
    home = os.path.expanduser("~")  # noqa: PTH111 - as Keras does
    base = environment.get("KERAS_HOME") or f"{home if os.access(home, os.W_OK) else '/tmp'}/.keras"  # noqa: S108
    if not base.endswith("/facegender"):
        environment["KERAS_HOME"] = f"{base}/facegender"
    # A notebook's kernel names a backend that is not installed here. Nothing is shown on a screen.
    environment["MPLBACKEND"] = "agg"
    environment["MATPLOTLIBRC"] = os.devnull
    return dropped


def _decides(name: str) -> bool:
    return name.startswith(_DECISIVE) and not name.startswith(_HARMLESS)


def restart_without_early_settings() -> None:
    """Restart this process if Python or a library has already read a setting that may decide.

    So does a locale other than UTF-8, because text files of the pipeline are UTF-8.
    """
    environment = without_early_settings(os.environ, locale.getpreferredencoding(False))
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606


def without_early_settings(environment: Mapping[str, str], encoding: str) -> dict[str, str] | None:
    """Return the environment to restart with, or None if no restart is needed."""
    kept = {
        name: value
        for name, value in environment.items()
        if environment.get(KEEP) or not name.startswith(_EARLY)
    }
    if encoding.lower().replace("-", "") != "utf8":
        kept["PYTHONUTF8"] = "1"
    return kept if kept != dict(environment) else None
