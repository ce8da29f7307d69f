"""The ranges of the activations of dlib's network, for its form in eight bits.

They were measured on 318 aligned faces of LFW by `tests/bench/eight_bits.py`. On either side 3 in 100,000 values lie
outside. Wider ranges round more coarsely, narrower ones clip: of the shares 1e-3, 3e-4, 1e-4, 3e-5 and 1e-5 this is the
best.
"""

# (lowest, highest) of each activation, in the order of `dlib_onnx.build_dlib_onnx_with_activations`.
RANGES: tuple[tuple[float, float], ...] = (
    (0.0, 6.33),
    (0.0, 5.791),
    (-6.925, 4.549),
    (0.0, 8.16),
    (0.0, 5.063),
    (-7.574, 6.107),
    (0.0, 9.505),
    (0.0, 4.581),
    (-6.087, 7.586),
    (0.0, 12.73),
    (0.0, 4.783),
    (-4.422, 5.916),
    (0.0, 8.652),
    (0.0, 4.52),
    (-4.385, 5.784),
    (0.0, 10.06),
    (0.0, 4.279),
    (-5.277, 6.054),
    (0.0, 13.47),
    (0.0, 4.315),
    (-4.965, 5.544),
    (0.0, 14.25),
    (0.0, 4.586),
    (-3.541, 4.876),
    (0.0, 7.421),
    (0.0, 3.761),
    (-4.236, 4.393),
    (0.0, 6.858),
    (0.0, 4.781),
    (-5.357, 5.364),
    (0.0, 7.122),
    (0.0, 5.069),
    (-5.41, 7.772),
    (0.0, 6.874),
    (0.0, 3.579),
    (-4.906, 3.451),
    (0.0, 6.751),
    (0.0, 3.142),
    (-2.966, 2.579),
    (0.0, 6.798),
    (0.0, 6.31),
    (-3.149, 2.325),
    (0.0, 4.88),
)
