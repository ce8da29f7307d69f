"""Measure how well `clean` finds and repairs injected label flips, beside cleanlab's label-issue finder.

    python tests/bench/cleaning.py GALLERY [--least 4] [--rates 0.1 0.2 0.4] [--seeds 3] [--cleanlab PYTHON]

GALLERY holds labelled real faces (LFW-dev). Identities with at least --least images are taken, one face per image (the
largest). Each label is swapped for that of another of these identities with the given probability. No threshold is set
by hand. cleanlab is AGPL and not a dependency: PYTHON is an interpreter that has it (and scikit-learn). It gets the same
vectors and labels, and out-of-sample probabilities of 5-fold k-nearest-neighbour and logistic-regression classifiers.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from galleries import append

from facepipe.arrow import to_vectors
from facepipe.evaluation.cleaning import evaluate_clean
from facepipe.gallery import Gallery
from pipelines.clean import CleanConfig, run

_CLEANLAB = """
import sys, json, numpy as np
from cleanlab.filter import find_label_issues
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.linear_model import LogisticRegression
data = np.load(sys.argv[1]); x, y = data["x"], data["y"]
fold = StratifiedKFold(5, shuffle=True, random_state=0)
out = {}
for name, model in (("knn", KNeighborsClassifier(10, weights="distance")), ("logistic", LogisticRegression(C=100, max_iter=300))):
    p = cross_val_predict(model, x, y, cv=fold, method="predict_proba")
    p = np.clip(p, 1e-6, None); p /= p.sum(axis=1, keepdims=True)
    out[name] = find_label_issues(y, p).tolist()
print(json.dumps(out))
"""


def select_faces(gallery: Gallery, min_images: int) -> pa.Table:
    """Select the largest face of each image of the identities that have enough images."""
    table = gallery.to_arrow(where="status = 'ok' and identity is not null")
    box = to_vectors(table["box"], 4)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    order = np.lexsort((-area, pc.dictionary_encode(table["uri"].combine_chunks()).indices.to_numpy()))
    codes = pc.dictionary_encode(table["uri"].combine_chunks()).indices.to_numpy()[order]
    table = table.take(pa.array(order[np.diff(codes, prepend=-1) != 0]))
    names = pc.dictionary_encode(table["identity"].combine_chunks()).indices.to_numpy()
    return table.filter(pa.array(np.bincount(names)[names] >= min_images))


def flip_labels(names: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Swap each of the identities' codes (n,) for another one with a probability of `rate`."""
    rng = np.random.default_rng(seed)
    count = int(names.max()) + 1
    is_wrong = rng.random(len(names)) < rate
    return np.where(is_wrong, (names + rng.integers(1, count, len(names))) % count, names)


def compute_f(flagged: np.ndarray, wrong: np.ndarray) -> float:
    hit = int((flagged & wrong).sum())
    return 2 * hit / max(1, int(flagged.sum()) + int(wrong.sum()))


def run_trials(table: pa.Table, gallery: Gallery, args: argparse.Namespace) -> Iterator[str]:
    """Run `clean` on each rate and seed, and yield one line of figures per run."""
    coded = pc.dictionary_encode(table["identity"].combine_chunks())
    names = coded.indices.to_numpy()
    identities = np.array(coded.dictionary.to_pylist(), object)
    for rate in args.rates:
        for seed in range(args.seeds):
            given = flip_labels(names, rate, seed)
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/G"
                noisy = table.set_column(
                    table.column_names.index("identity"), "identity", pa.array(identities[given], pa.string())
                )
                append(Gallery.create(path, gallery.contract), iter([noisy]), "noisy")
                run(CleanConfig(), path)
                truth = f"{folder}/truth.parquet"
                pq.write_table(table.select(["face_id", "identity"]), truth)
                result = evaluate_clean(Gallery(path), truth).to_dict()
                other_flags = run_cleanlab(args.cleanlab, folder, table, given)
            detection = result["detection"]
            line = f"{rate:.0%} seed {seed}: F {detection['f']:.4f} (P {detection['precision']:.4f}, R {detection['recall']:.4f}), "
            line += (
                f"flips relabelled rightly {result['repaired']:.4f}, relabels right {result['relabels_right']:.4f}, "
            )
            line += f"errors {result['errors']} (expected {result['expected_errors']:.1f})"
            for name, flags in other_flags.items():
                line += f"; cleanlab {name} F {compute_f(np.array(flags), given != names):.4f}"
            yield line


def run_cleanlab(python: str | None, folder: str, table: pa.Table, given: np.ndarray) -> dict[str, list[bool]]:
    """Find label issues with cleanlab, by classifier; nothing without an interpreter that has it."""
    if python is None:
        return {}
    codes = np.unique(given, return_inverse=True)[1]
    np.savez(f"{folder}/data.npz", x=to_vectors(table["embedding"], 128), y=codes)
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _CLEANLAB, f"{folder}/data.npz"], check=True, capture_output=True, text=True
    )
    flags: dict[str, list[bool]] = json.loads(done.stdout.splitlines()[-1])
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("--least", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cleanlab")
    args = parser.parse_args()
    gallery = Gallery(str(args.gallery))
    table = select_faces(gallery, args.least)
    print(f"{table.num_rows} faces of {pc.count_distinct(table['identity'])} identities")
    for line in run_trials(table, gallery, args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
