"""What a graph costs in seconds: comparing all faces, or those that share a cell. Only ratios matter.

The constants, and their sources, are those of facepipe.index.cost; those of a GPU are estimated, not measured.
"""

from facepipe.index.cost import BLOCK_ROWS, DEVICE_PRODUCT, DEVICE_START, PRODUCT, UPLOAD

CELLS_PER_FACE = 6  # a guess: the number is chosen later, by the measured recall


def estimate_all_pairs(faces: int, cores: int, gpu: bool) -> float:
    """Estimate the cost of comparing every pair of faces once.

    To a GPU all later faces are sent once per 262,144 faces, half of all on average.
    """
    pairs = faces**2 / 2
    if not gpu:
        return 1e-9 * PRODUCT * pairs / cores
    passes = max(1.0, faces / BLOCK_ROWS / 2)
    return 1e-9 * (DEVICE_START + DEVICE_PRODUCT * pairs + UPLOAD * faces * passes)


def estimate_cells(faces: int, cores: int, faces_per_cell: int) -> float:
    """Estimate the cost of comparing the pairs that share a cell.

    A face is compared with all centres to find its nearest, and with half of the faces in each of these cells. k-means
    is not counted: eight rounds over 64 faces per cell.
    """
    compared = faces / faces_per_cell + CELLS_PER_FACE * (faces_per_cell * CELLS_PER_FACE) / 2
    return 1e-9 * PRODUCT * faces * compared / cores
