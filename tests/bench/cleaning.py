"""Injected label flips: how well `clean` finds and repairs them, beside cleanlab's label-issue finder where it is there.

    python tests/bench/cleaning.py GALLERY [--least 4] [--rates 0.1 0.2 0.4] [--seeds 3] [--cleanlab PYTHON]

GALLERY holds labelled real faces (LFW-dev). Identities with at least --least images are taken, one face an image (the
largest), and each label is swapped for that of another of these identities with the given probability. No threshold is
set by hand. cleanlab is AGPL and no dependency: PYTHON is an interpreter that has it (and scikit-learn); it gets the same
vectors, labels, and out-of-sample probabilities of 5-fold k-nearest-neighbour and logistic-regression classifiers.
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


def chosen(gallery: Gallery, least: int) -> pa.Table:
    """The largest face of each image of identities that have enough images."""
    table = gallery.to_arrow(where="status = 'ok' and identity is not null")
    box = to_vectors(table["box"], 4)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    order = np.lexsort((-area, pc.dictionary_encode(table["uri"].combine_chunks()).indices.to_numpy()))
    codes = pc.dictionary_encode(table["uri"].combine_chunks()).indices.to_numpy()[order]
    table = table.take(pa.array(order[np.diff(codes, prepend=-1) != 0]))
    names = pc.dictionary_encode(table["identity"].combine_chunks()).indices.to_numpy()
    return table.filter(pa.array(np.bincount(names)[names] >= least))


def flipped(names: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Codes (n,) of identities, each swapped for another with the given probability."""
    rng, count = np.random.default_rng(seed), int(names.max()) + 1
    wrong = rng.random(len(names)) < rate
    return np.where(wrong, (names + rng.integers(1, count, len(names))) % count, names)


def f_score(flagged: np.ndarray, wrong: np.ndarray) -> float:
    hit = int((flagged & wrong).sum())
    return 2 * hit / max(1, int(flagged.sum()) + int(wrong.sum()))


def trials(table: pa.Table, gallery: Gallery, args: argparse.Namespace) -> Iterator[str]:
    coded = pc.dictionary_encode(table["identity"].combine_chunks())
    names, people = coded.indices.to_numpy(), np.array(coded.dictionary.to_pylist(), object)
    for rate in args.rates:
        for seed in range(args.seeds):
            given = flipped(names, rate, seed)
            with tempfile.TemporaryDirectory() as folder:
                place = f"{folder}/G"
                noisy = table.set_column(
                    table.column_names.index("identity"), "identity", pa.array(people[given], pa.string())
                )
                append(Gallery.create(place, gallery.contract), iter([noisy]), "noisy")
                run(CleanConfig(), place)
                truth = f"{folder}/truth.parquet"
                pq.write_table(table.select(["face_id", "identity"]), truth)
                found = evaluate_clean(Gallery(place), truth).to_dict()
                rivals = _rivals(args.cleanlab, folder, table, given)
            d = found["detection"]
            line = f"{rate:.0%} seed {seed}: F {d['f']:.4f} (P {d['precision']:.4f}, R {d['recall']:.4f}), "
            line += f"flips relabelled rightly {found['repaired']:.4f}, relabels right {found['relabels_right']:.4f}, "
            line += f"errors {found['errors']} (expected {found['expected_errors']:.1f})"
            for name, flags in rivals.items():
                line += f"; cleanlab {name} F {f_score(np.array(flags), given != names):.4f}"
            yield line


def _rivals(python: str | None, folder: str, table: pa.Table, given: np.ndarray) -> dict[str, list[bool]]:
    if python is None:
        return {}
    kept = np.unique(given, return_inverse=True)[1]
    np.savez(f"{folder}/data.npz", x=to_vectors(table["embedding"], 128), y=kept)
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _CLEANLAB, f"{folder}/data.npz"], check=True, capture_output=True, text=True
    )
    found: dict[str, list[bool]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("--least", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cleanlab")
    args = parser.parse_args()
    gallery = Gallery(str(args.gallery))
    table = chosen(gallery, args.least)
    print(f"{table.num_rows} faces of {pc.count_distinct(table['identity'])} identities")
    for line in trials(table, gallery, args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
