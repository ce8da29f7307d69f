"""Array types, named once by their dtype. Shapes stand in the docstrings of the functions that use them."""

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int8 = npt.NDArray[np.int8]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt8Image = npt.NDArray[np.uint8]  # (h, w, 3) RGB unless a docstring says otherwise
UInt64 = npt.NDArray[np.uint64]
