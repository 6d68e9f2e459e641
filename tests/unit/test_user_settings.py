"""Settings from the user's other projects change no result and stop no stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from facegender.runtime.user_settings import KEEP, drop_user_settings, without_early_settings
from tests.conftest import run_command
from tools.compose_params import ROOT

STAGE = """
import hashlib, os, sys
from pathlib import Path
import numpy, pandas
from facegender.evaluation import plots
from facegender.runtime.entry_points import run_stage

def main():
    import keras, tensorflow
    config = keras.config
    print(config.backend(), config.floatx(), config.epsilon(), config.image_data_format(),
        config.max_epochs(), tensorflow.config.threading.get_intra_op_parallelism_threads())
    print(pandas.Series(["a"]).dtype, sys.flags.optimize)
    plots.class_distribution({"female": 1, "male": 2}, "title", Path("plot.png"))
    print(hashlib.sha256(Path("plot.png").read_bytes()).hexdigest())
    print(sorted(name for name in os.environ if name.startswith(("TF_", "ONEDNN", "NPY"))))

if __name__ == "__main__":
    run_stage(main)
"""


def run_in(folder: Path, **env: str) -> subprocess.CompletedProcess:
    (folder / "stage.py").write_text(STAGE)
    (folder / ".dvc").mkdir(exist_ok=True)
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return run_command(sys.executable, "stage.py", cwd=folder, env=clean | env)


def test_a_stage_does_the_same_whatever_the_user_has_set(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = run_in(tmp_path / "plain")
    assert "not used" not in plain.stderr
    assert plain.stdout.startswith("tensorflow float32 1e-07 channels_last None 0\nstr 0\n")

    home = tmp_path / "home"
    for name, content in {
        # Keras refuses an epsilon that is not a float with a traceback.
        ".keras/keras.json": json.dumps(
            {
                "floatx": "float16",
                "epsilon": 1,
                "backend": "jax",
                "image_data_format": "channels_first",
            }
        ),
        ".config/matplotlib/matplotlibrc": "font.size: 30",
        "matplotlibrc": "axes.facecolor: red",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    noisy = run_in(
        home,
        KERAS_BACKEND="jax",
        KERAS_MAX_EPOCHS="1",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        TF_ENABLE_ONEDNN_OPTS="0",
        TF_NUM_INTRAOP_THREADS="1",
        TF_USE_LEGACY_KERAS="1",
        ONEDNN_MAX_CPU_ISA="SSE41",
        NPY_DISABLE_CPU_FEATURES="X86_V4",
        PANDAS_FUTURE_INFER_STRING="0",
        SCIPY_ARRAY_API="1",
        PYTHONWARNINGS="error::DeprecationWarning",
        PYTHONOPTIMIZE="1",
    )
    assert noisy.stdout == plain.stdout
    # The user is told.
    assert "KERAS_BACKEND, KERAS_MAX_EPOCHS, ONEDNN_MAX_CPU_ISA, TF_ENABLE_ONEDNN" in noisy.stderr


def test_a_locale_other_than_utf_8_starts_the_process_again() -> None:
    assert without_early_settings({"LC_ALL": "de_DE"}, "ISO-8859-1") == {
        "LC_ALL": "de_DE",
        "PYTHONUTF8": "1",
    }
    assert without_early_settings({"LC_ALL": "C.UTF-8"}, "UTF-8") is None
    assert without_early_settings({"NPY_A": "1", "B": "2"}, "utf-8") == {"B": "2"}


@pytest.mark.parametrize(
    "name", ["TF_CONFIG", "TF_CPP_MIN_LOG_LEVEL", "TF_VAR_terraform", "OMP_NUM_THREADS"]
)
def test_what_decides_no_number_stays(name: str) -> None:
    environment = {name: "x"}
    assert drop_user_settings(environment) == []
    assert environment[name] == "x"


def test_weights_are_cached_in_one_folder_however_deep_the_processes() -> None:
    environment = {"KERAS_HOME": "/big/keras"}
    for _ in range(2):
        drop_user_settings(environment)
        assert environment["KERAS_HOME"] == "/big/keras/facegender"


def test_a_measurement_keeps_what_it_sets() -> None:
    environment = {KEEP: "1", "TF_ENABLE_ONEDNN_OPTS": "0", "NPY_A": "1"}
    assert without_early_settings(environment, "utf-8") is None
    assert drop_user_settings(environment) == []
    assert environment["TF_ENABLE_ONEDNN_OPTS"] == "0"
