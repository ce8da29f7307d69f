"""Contact sheet of a gallery: its thumbnails as one picture."""

from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

from facepipe.gallery import Gallery

# Faces per row.
_COLUMNS = 9


def draw_contact_sheet(gallery: Gallery, path: Path) -> Path:
    """Draw the thumbnails of a gallery, one row per identity, and list the images without a face below them.

    Args:
        gallery: the gallery, whose uris are file paths.
        path: file for the picture.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    rows = gallery.to_arrow(["uri", "identity", "status", "error", "det_score", "thumb"]).to_pylist()

    # Group the faces by identity, and keep as many of each as fit on a row.
    faces = sorted((row for row in rows if row["thumb"]), key=lambda row: (row["identity"] or "", row["uri"]))
    people = [(name, list(group)[:_COLUMNS]) for name, group in groupby(faces, key=lambda row: row["identity"])]

    # Draw one row per identity.
    figure = Figure(figsize=(1.1 * _COLUMNS + 1, 1.25 * len(people) + 0.5))
    for row_number, (name, group) in enumerate(people):
        for column, row in enumerate(group):
            axes = figure.add_subplot(len(people), _COLUMNS, row_number * _COLUMNS + column + 1)
            axes.imshow(np.asarray(cv2.imdecode(np.frombuffer(row["thumb"], np.uint8), cv2.IMREAD_COLOR_RGB)))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{Path(row['uri']).name}\n{row['det_score']:.2f}", fontsize=5.5, pad=2)
            if column == 0:
                axes.set_ylabel(name, fontsize=8)

    # List the images without a face, with their status.
    without_face = [f"{Path(row['uri']).name}: {row['status']}" for row in rows if not row["thumb"]]
    figure.text(0.01, 0.005, "without a face: " + ", ".join(sorted(without_face)), fontsize=5.5, wrap=True)
    figure.subplots_adjust(left=0.07, right=0.99, top=0.95, bottom=0.05, hspace=0.35, wspace=0.08)
    figure.savefig(path, dpi=140)
    return path
