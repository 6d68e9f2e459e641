"""Measure the label audit: flip labels of a training split at random, and count which are found.

Prints the precision and recall of what `cleanlab` names, and the precision of as many of the worst
labels as were flipped. Recipe best uses the same weights.

    python -m bench.label_audit ../shared/photos --weights ../shared/weights/NAME.h5
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from bench.common import new_network
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.data.splits import split_at_random
from facegender.runtime.entry_points import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="class folders with photos")
    parser.add_argument("--weights", required=True, help="imagenet, or a file without top")
    parser.add_argument("--fraction", type=float, default=0.03, help="labels to flip")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--seeds", type=int, default=5, help="random flips to try")
    args = parser.parse_args()

    from facegender.evaluation.label_audit import judge_labels

    manifest = build_manifest(args.folder, female=["woman"], male=["man"], ignore=[])
    train = split_at_random(manifest, test_fraction=0.3, validation_fraction=0.15, seed=42)["train"]
    network = new_network(args.size, weights=args.weights, batch_norm="frozen")
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        write_split(train, args.folder, Path(folder) / "train", size=args.size, name="train")
        part = ProcessedSplit(Path(folder) / "train")
        extract = network.features()
        features = np.concatenate([extract.predict_on_batch(b) for b in part.batches(32)])
        labels, groups = part.labels, list(part.index["sha256"])
    before = judge_labels(features, labels, groups, seed=0)
    wrong = ((before["probability"] >= 0.5).to_numpy() != labels).mean()
    print(f"{len(labels)} images; out of fold, the classifier is right on {1 - wrong:.4f} of them")
    print(f"without flips, {int(before['suspect'].sum())} labels are suspect")
    count = round(args.fraction * len(labels))
    for seed in range(args.seeds):
        flipped = np.zeros(len(labels), bool)
        flipped[np.random.default_rng(seed).choice(len(labels), count, replace=False)] = True
        found = judge_labels(features, np.where(flipped, 1 - labels, labels), groups, seed=0)
        worst = found["quality"].argsort(kind="stable")[:count]
        suspect = found["suspect"].to_numpy()
        hits = int((suspect & flipped).sum())
        print(
            f"seed {seed}: {count} flipped, {suspect.sum()} suspect: precision "
            f"{hits / max(1, suspect.sum()):.3f}, recall {hits / count:.3f}; of the {count} worst, "
            f"{flipped[worst].mean():.3f} are flipped"
        )


if __name__ == "__main__":
    run_command(main)
