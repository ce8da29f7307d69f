"""Clean corpora of many sizes and kinds of noise, and print what is found, repaired and lost, and how well it is known.

    python tests/bench/clean_mixes.py [NAME ...] [--lfw GALLERY] [--seed 1] [--seeds 1] [--bins]

Per corpus: identities, wrong labels, of these found (outlier, relabel, or review with a noise above 0.5) and relabelled
rightly, precision of relabelling, right labels lost (outlier or relabel), wrong labels kept, labels in review and how many
of them are wrong, beside how many are expected to be; unverified labels; wrong decisions, beside the expected number.
--bins adds a reliability curve: labels by noise, with the share that is wrong. --lfw takes real faces; nothing of them is
left out. Each seed halves their identities in another way, so that the halves say how far constants that were chosen on
the whole hold. The corpora of 30,000 and 100,000 identities run only if they are named.
"""
# ruff: noqa: E402

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

# The repository comes before tests/, which has a folder of the package's name.
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from bench.galleries import CONTRACT
from cleaning import select_faces
from hard_faces import (
    EASY,
    ArcFaceLike,
    DlibLike,
    DrawnFaces,
    add_copied_outsider,
    add_outsiders,
    make_hard_gallery,
    swap_labels,
)

from facepipe.arrow import to_vectors
from facepipe.gallery import Contract, Gallery
from pipelines.clean import CleanConfig, run

CARD = Contract("synthetic", "0" * 64, "dlib-resnet", "0" * 64, "none", False)
_BINS = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 1.001)


def draw(persons: int, each: int, rate: float, seed: int, *, arc: bool = False, easy: bool = False) -> DrawnFaces:
    space = ArcFaceLike(seed, hardness=EASY if easy else None) if arc else DlibLike(seed, EASY if easy else None)
    faces = space.draw(space.draw_centres(persons), np.arange(persons * each) % persons)
    return swap_labels(faces, rate, seed)


def draw_open(persons: int, share: float, seed: int) -> DrawnFaces:
    """Draw identities of ten, and outsiders who are a share of all."""
    space = DlibLike(seed)
    faces = space.draw(space.draw_centres(persons), np.arange(persons * 10) % persons)
    count = int(len(faces) * share / (1 - share))
    return add_outsiders(faces, space.draw(space.draw_centres(count), np.arange(count)), seed)


def list_corpora() -> dict[str, Callable[[int], DrawnFaces]]:
    return {
        "easy 300 x 5, 20 %": lambda s: draw(300, 5, 0.2, s, easy=True),
        "easy 3,000 x 5, 20 %": lambda s: draw(3000, 5, 0.2, s, easy=True),
        "hard 300 x 5, 20 %": lambda s: draw(300, 5, 0.2, s),
        "hard 3,000 x 5, 20 %": lambda s: draw(3000, 5, 0.2, s),
        "hard 1,000 x 10, 40 %": lambda s: draw(1000, 10, 0.4, s),
        "arc 3,000 x 5, 20 %": lambda s: draw(3000, 5, 0.2, s, arc=True),
        "hard 700 x 10, 40 % outsiders": lambda s: draw_open(700, 0.4, s),
        "hard 30,000 x 5, 20 %": lambda s: draw(30_000, 5, 0.2, s),
        "hard 100,000 x 4, 20 %": lambda s: draw(100_000, 4, 0.2, s),
        "arc 30,000 x 5, 20 %": lambda s: draw(30_000, 5, 0.2, s, arc=True),
    }


_LARGE = ("30,000", "100,000")


def load_real(path: str) -> DrawnFaces:
    """Load the largest face of each real photo."""
    table = select_faces(Gallery(path), 1)
    person = np.unique(np.array(table["identity"].to_pylist()), return_inverse=True)[1]
    return DrawnFaces(person, to_vectors(table["embedding"], 128), np.ones(len(person)))


def renumber(faces: DrawnFaces) -> DrawnFaces:
    """Number the photos from 0."""
    return DrawnFaces(faces.person, faces.vectors, faces.noise, faces.label)


def list_real(faces: DrawnFaces) -> dict[str, Callable[[int], DrawnFaces]]:
    """List corpora of real faces. `many` are the identities with at least four photos."""
    size = np.bincount(faces.person)[faces.person]
    many = size >= 4
    singles = np.flatnonzero(size == 1)

    def copy_outsiders(seed: int, copies: int) -> DrawnFaces:
        chosen = np.unique(faces.person[(size >= 6) & (size <= 9)])
        outsiders = faces.take(np.random.default_rng(seed).choice(singles, len(chosen), replace=False))
        return add_copied_outsider(renumber(faces.take(many)), renumber(outsiders), chosen, copies)

    def join_pairs(seed: int) -> DrawnFaces:
        """Give two persons one name, with as many faces each."""
        persons = np.random.default_rng(seed).permutation(np.unique(faces.person[many]))
        half = len(persons) // 2
        parts = []
        for first, second in zip(persons[:half], persons[half : 2 * half], strict=True):
            left = np.flatnonzero(faces.person == first)
            right = np.flatnonzero(faces.person == second)
            count = min(len(left), len(right))
            both = faces.take(np.concatenate([left[:count], right[:count]]))
            person = np.where(both.person == first, first, -1)
            parts.append(DrawnFaces(person, both.vectors, both.noise, np.full(2 * count, first)))
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.concatenate(part)
        return joined

    def spoil_pairs(seed: int, count: int) -> DrawnFaces:
        """Put an outsider in the place of one face of some identities of two."""
        rng = np.random.default_rng(seed)
        pairs = rng.choice(np.unique(faces.person[size == 2]), count, replace=False)
        at = np.array([rng.choice(np.flatnonzero(faces.person == person)) for person in pairs])
        vectors = faces.vectors.copy()
        vectors[at] = faces.vectors[rng.choice(singles, count, replace=False)]
        person = faces.person.copy()
        person[at] = -1
        return renumber(DrawnFaces(person, vectors, faces.noise, faces.person.copy()).take(size >= 2))

    def halve(seed: int, half: int) -> DrawnFaces:
        """Take half of the persons, and swap labels of those with at least four photos."""
        is_first = np.random.default_rng([seed, 51]).random(int(faces.person.max()) + 1) < 0.5
        is_taken = is_first[faces.person] == (half == 0)
        part = renumber(faces.take(is_taken))
        return swap_labels(part, 0.2, seed, chosen=many[is_taken])

    return {
        "LFW half 1, 20 % of >= 4": lambda s: halve(s, 0),
        "LFW half 2, 20 % of >= 4": lambda s: halve(s, 1),
        "LFW >= 4 only, 20 %": lambda s: swap_labels(renumber(faces.take(many)), 0.2, s),
        "LFW whole, 20 % of >= 4": lambda s: swap_labels(faces, 0.2, s, chosen=many),
        "LFW whole, 10 %": lambda s: swap_labels(faces, 0.1, s),
        "LFW whole, right": lambda s: faces,
        "LFW, outsider x 3": lambda s: copy_outsiders(s, 3),
        "LFW, outsider x 10": lambda s: copy_outsiders(s, 10),
        "LFW, two persons half each": join_pairs,
        "LFW, 100 spoilt pairs": lambda s: spoil_pairs(s, 100),
        "LFW, 200 spoilt pairs": lambda s: spoil_pairs(s, 200),
    }


def run_corpus(faces: DrawnFaces, contract: Contract, *, bins: bool) -> str:
    """Clean a corpus, and return the cells of its row."""
    with tempfile.TemporaryDirectory() as folder:
        gallery = make_hard_gallery(Path(folder) / "G", faces, contract)
        summary = run(CleanConfig(), gallery.path)
        columns = ["uri", "decision", "suggested", "suggested_probability", "noise"]
        found = pq.read_table(f"{gallery.path}/reports/clean/decisions.parquet", columns=columns)
    # Photos are numbered as the faces are.
    photo = np.array([int(uri[-13:-4]) for uri in found["uri"].to_pylist()])
    person = faces.person[photo]
    wrong = faces.is_wrong[photo]
    decision = np.array(found["decision"].to_pylist(), object)
    noise = found["noise"].to_numpy().astype(float)
    suggested = np.array(found["suggested"].to_pylist(), object)
    is_right = suggested == np.array([f"person{n}" for n in person], object)
    relabelled = decision == "relabel"
    dropped = np.isin(decision, ["outlier", "relabel"])
    flagged = dropped | ((decision == "review") & (noise > 0.5))
    # A flip can be repaired if three faces of the true identity bear its name.
    known = np.unique(person[~wrong], return_counts=True)
    repairable = wrong & (person >= 0) & np.isin(person, known[0][known[1] >= 3])
    line = f"{len(np.unique(faces.label)):6} {wrong.sum():6} {(wrong & flagged).sum():6} "
    line += f"{(relabelled & is_right & repairable).sum():6} of {repairable.sum():5} "
    line += f"{is_right[relabelled].mean() if relabelled.any() else float('nan'):6.3f} "
    review = decision == "review"
    decided = ~np.isin(decision, ["review", "unverified", "bystander"])
    error = np.where(relabelled, ~is_right, wrong != (decision == "outlier")) & decided
    certainty = found["suggested_probability"].to_numpy().astype(float)
    expected = np.where(relabelled, 1 - certainty, np.where(decision == "outlier", 1 - noise, noise))[decided].sum()
    line += f"{(dropped & ~wrong).sum():6} {(wrong & (decision == 'keep')).sum():6} "
    line += f"{review.sum():6} {(review & wrong).sum():6} {noise[review].sum():8.1f} "
    line += f"{(decision == 'unverified').sum():10} {error.sum():6} {expected:8.1f} "
    line += f"  {summary.swapped:.3f} {summary.nobody:.3f} {summary.rounds}"
    if bins:
        for low, high in pairwise(_BINS):
            inside = (noise >= low) & (noise < high)
            if inside.any():
                line += f"\n    noise {low:.2f} to {min(high, 1):.2f}: {inside.sum():6} labels, "
                line += f"mean {noise[inside].mean():.3f}, wrong {wrong[inside].mean():.3f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--lfw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--bins", action="store_true")
    args = parser.parse_args()
    head = f"{'corpus':32} names  wrong  found  relabelled of   prec.   lost   kept review  wrong expected unverified "
    head += "errors expected"
    print(head + "  swapped nobody rounds")
    corpora = list_real(load_real(args.lfw)) if args.lfw else {}
    for name, make in (corpora | list_corpora()).items():
        is_wanted = any(part in name for part in args.names)
        if not is_wanted and (args.names or any(size in name for size in _LARGE)):
            continue
        contract = CONTRACT if name.startswith("arc") else CARD
        for seed in range(args.seed, args.seed + args.seeds):
            row = name if args.seeds == 1 else f"{name}, seed {seed}"
            print(f"{row:32} {run_corpus(make(seed), contract, bins=args.bins)}", flush=True)


if __name__ == "__main__":
    main()
