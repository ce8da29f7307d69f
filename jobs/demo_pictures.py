"""Pictures of a gallery for the demo."""

from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

from facepipe.gallery import Gallery

_COLUMNS = 9


def contact_sheet(gallery: Gallery, path: Path) -> Path:
    """Draw the thumbnails by identity, one row a person, and the images that gave none, by status."""
    from matplotlib.figure import Figure

    rows = gallery.to_arrow(["uri", "identity", "status", "error", "det_score", "thumb"]).to_pylist()
    faces = sorted((r for r in rows if r["thumb"]), key=lambda r: (r["identity"] or "", r["uri"]))
    people = [(who, list(group)[:_COLUMNS]) for who, group in groupby(faces, key=lambda r: r["identity"])]
    figure = Figure(figsize=(1.1 * _COLUMNS + 1, 1.25 * len(people) + 0.5))
    for n, (who, group) in enumerate(people):
        for k, row in enumerate(group):
            axes = figure.add_subplot(len(people), _COLUMNS, n * _COLUMNS + k + 1)
            axes.imshow(np.asarray(cv2.imdecode(np.frombuffer(row["thumb"], np.uint8), cv2.IMREAD_COLOR_RGB)))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{Path(row['uri']).name}\n{row['det_score']:.2f}", fontsize=5.5, pad=2)
            if k == 0:
                axes.set_ylabel(who, fontsize=8)
    failed = [f"{Path(r['uri']).name}: {r['status']}" for r in rows if not r["thumb"]]
    figure.text(0.01, 0.005, "without a face: " + ", ".join(sorted(failed)), fontsize=5.5, wrap=True)
    figure.subplots_adjust(left=0.07, right=0.99, top=0.95, bottom=0.05, hspace=0.35, wspace=0.08)
    figure.savefig(path, dpi=140)
    return path
