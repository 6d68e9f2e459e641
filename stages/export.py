"""Stage 5: export the model to LiteRT, as float32 and int8, and compare both with Keras."""

import argparse
import json
import logging
from pathlib import Path

from facegender.errors import UserError
from facegender.faces.settings import crop_of
from facegender.inference.model_crop import write_crop
from facegender.params import load_params
from facegender.runtime.dvc_context import check_inputs
from facegender.runtime.entry_points import run_stage
from facegender.runtime.optional_packages import without_packages
from facegender.runtime.output_capture import hide_native_notes

_log = logging.getLogger("facegender.stages.export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--processed", type=Path, required=True, help="directory of the images")
    parser.add_argument("--model", type=Path, required=True, help="the trained model")
    parser.add_argument("--float32", type=Path, required=True, help="file to write (.tflite)")
    parser.add_argument("--int8", type=Path, required=True, help="file to write (.tflite)")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    params = load_params(args.params)
    read = [args.processed / "train", args.processed / "validation"]
    check_inputs(args.params.with_name("dvc.lock"), [*read, args.model])

    # After the arguments, so that --help and a bad parameter do not wait for TensorFlow.
    with hide_native_notes(), without_packages("matplotlib", "sklearn"):
        from facegender.data.processed import ProcessedSplit
        from facegender.inference import export
        from facegender.inference.litert import load_litert
        from facegender.inference.threshold import write_threshold
        from facegender.model.saved_model import load_model, predict_arrays

    model, validation = load_model(args.model), ProcessedSplit(args.processed / "validation")
    representative = export.representative_images(
        ProcessedSplit(args.processed / "train"),
        params.export.calibration_images,
        params.export.seed,
    )
    with hide_native_notes():
        converted = export.convert(model, representative)
    for path, content in zip((args.float32, args.int8), converted, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        write_threshold(path, params.evaluate.threshold)
        write_crop(path, crop_of(params.image))
    expected = predict_arrays(model, validation.batches(params.evaluate.batch_size))
    results = {
        name: export.exported_metrics(
            path,
            load_litert(path, threads=1),
            validation,
            expected,
            threshold=params.evaluate.threshold,
            batch_size=params.evaluate.batch_size,
        )
        for name, path in (("float32", args.float32), ("int8", args.int8))
    }
    # Rounded, because a loss of exactly one point can be 0.010000000000000009.
    loss = round(results["float32"]["accuracy"] - results["int8"]["accuracy"], 9)
    calibration = model.get_layer("calibration")
    report = {
        "n": len(validation),
        "latency_threads": 1,
        "calibration": {"slope": calibration.scale, "intercept": calibration.offset},
        **results,
        "int8_accuracy_loss": loss,
        "int8_accuracy_within_limit": loss <= export.MAX_INT8_LOSS,
    }
    args.metrics.parent.mkdir(parents=True, exist_ok=True)
    args.metrics.write_text(json.dumps(report, indent=2) + "\n")
    difference = results["float32"]["max_abs_difference"]
    # Written this way round, NaN fails too.
    if not difference <= export.MAX_FLOAT_DIFFERENCE:
        raise UserError(
            f"The float32 export is not the model that was trained: P(male) differs by up to "
            f"{difference:.2g} on the validation split, and {export.MAX_FLOAT_DIFFERENCE:g} is "
            "allowed. The converter and the runtime may not match: install requirements.lock."
        )
    if loss > export.MAX_INT8_LOSS:
        _log.warning(
            "int8 loses %.1f points of accuracy on the validation split (%.4f, float32 %.4f), more "
            "than the %.0f allowed: use the float32 model, or raise export.calibration_images",
            100 * loss,
            results["int8"]["accuracy"],
            results["float32"]["accuracy"],
            100 * export.MAX_INT8_LOSS,
        )

    for name, result in results.items():
        print(
            f"{name}: {result['size_bytes'] / 1e6:.2f} MB, "
            f"validation accuracy {result['accuracy']:.4f}, "
            f"{result['latency_ms']:.2f} ms an image with one thread"
        )


if __name__ == "__main__":
    run_stage(main)
