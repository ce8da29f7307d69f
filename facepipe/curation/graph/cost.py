"""What a graph costs in seconds: comparing all faces, or those that share a cell. Only ratios decide.

The constants, and where they come from, are those of facepipe.index.cost; those of a GPU are estimated, not measured.
"""

from facepipe.index.cost import BLOCK_ROWS, DEVICE_PRODUCT, DEVICE_START, PRODUCT, UPLOAD

EACH = 6  # cells that a face lies in, as far as one can say before the recall is measured


def all_pairs(faces: int, cores: int, gpu: bool) -> float:
    """Every pair of faces once. To a GPU all faces behind them are sent for each 262,144, half of all on average."""
    pairs = faces**2 / 2
    if not gpu:
        return 1e-9 * PRODUCT * pairs / cores
    passes = max(1.0, faces / BLOCK_ROWS / 2)
    return 1e-9 * (DEVICE_START + DEVICE_PRODUCT * pairs + UPLOAD * faces * passes)


def cells(faces: int, cores: int, size: int) -> float:
    """Pairs that share a cell, of cells one for each `size` faces: a face is compared with all centres to find its
    nearest, and with half of the faces in each of these. k-means, eight rounds over 64 faces a cell, is left out."""
    compared = faces / size + EACH * (size * EACH) / 2
    return 1e-9 * PRODUCT * faces * compared / cores
