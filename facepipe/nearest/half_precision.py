"""Products of vectors in half precision, with a proven bound of what rounding does to them.

Two levels decide whether a product can reach a limit: first the maximum of each group of columns, then the single
columns of the groups that reach it. Nothing that reaches the limit in exact arithmetic is missed.

The bound. Let x, y be vectors in single precision, x', y' their halves, p the computed product. Then
|x'y' - xy| = |x'(y' - y) + (x' - x)y| <= |x'| |y' - y| + |x' - x| |y| (Cauchy-Schwarz, all four norms are measured).
Products of halves are exact in single precision. Summing n of them errs by at most n 2^-22 |x'| |y'|, in any order.
This holds even if sums are truncated instead of rounded, as tensor cores do (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1; Fasi et al., PeerJ CS 2021). Rounding the sum to a half is monotonic: what is at
least L becomes at least L less u |L|, with the unit roundoff u of the format. The total is about 0.0009 for float16 and
0.006 for bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Columns per group. Reading the maxima is 1/64 of reading the products, and a group's columns are examined together.
GROUP = 64
_GROUPS_PER_CHUNK = 1 << 18  # groups whose columns are examined in one go
# Error per term of a sum, relative to the product of both norms (see above).
_SUM_ERROR = 2.0**-22
_EXTRA_COLUMNS = 8  # tensor cores want multiples of eight
# Settings that would sum or multiply more coarsely than the bound assumes.
_REDUCED_PRECISION_FLAGS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
    "allow_tf32",
)


@dataclass(frozen=True)
class HalfVectors:
    """Vectors rounded to half precision, with norms that bound the rounding.

    Attributes:
        values: The rounded vectors (n, d).
        norms: Norms (n,) of the vectors before rounding, float64.
        half_norms: Norms (n,) of the rounded vectors, float64.
        error_norms: Norms (n,) of the differences, float64.
    """

    values: torch.Tensor
    norms: torch.Tensor
    half_norms: torch.Tensor
    error_norms: torch.Tensor

    def __getitem__(self, part: slice) -> "HalfVectors":
        return HalfVectors(self.values[part], self.norms[part], self.half_norms[part], self.error_norms[part])

    @classmethod
    def concatenate(cls, parts: "list[HalfVectors]") -> "HalfVectors":
        """Concatenate the rows of several."""
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([part.norms for part in parts]),
            torch.cat([part.half_norms for part in parts]),
            torch.cat([part.error_norms for part in parts]),
        )


def choose_dtype(device: str) -> torch.dtype:
    """Return the default format of products on a device.

    On a GPU float16: it costs what bfloat16 costs and rounds eight times finer. On a CPU float32.
    """
    return torch.float16 if device.startswith("cuda") else torch.float32


def round_to_half(vectors: torch.Tensor, dtype: torch.dtype) -> HalfVectors:
    """Round vectors to a format and measure the rounding.

    Args:
        vectors: float32 (n, d), of norms up to about 100: the largest float16 is 65,504, and products must not
            exceed it.
        dtype: the format.
    """
    values = vectors.to(dtype)
    exact = vectors.double()
    rounded = values.double()
    return HalfVectors(
        values,
        norms=torch.linalg.vector_norm(exact, dim=1),
        half_norms=torch.linalg.vector_norm(rounded, dim=1),
        error_norms=torch.linalg.vector_norm(rounded - exact, dim=1),
    )


def compute_squared_norms(vectors: torch.Tensor) -> torch.Tensor:
    """Compute the squared norms (n,) float64 of vectors (n, d)."""
    return vectors.double().square().sum(dim=1)


def append_term(vectors: torch.Tensor, term: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Append eight columns that add `term` to every product with a row of `append_ones`.

    The term is split in two columns, each exact in half precision or nearly. Eight columns, since tensor cores want
    multiples of eight.

    Args:
        vectors: float32 (n, d).
        term: (n,); None returns the vectors unchanged.
        dtype: the format that the result is rounded to.
    """
    if term is None:
        return vectors
    extra = vectors.new_zeros((len(vectors), _EXTRA_COLUMNS))
    extra[:, 0] = term.to(dtype).float()
    extra[:, 1] = term - extra[:, 0]
    return torch.cat([vectors, extra], dim=1)


def append_ones(vectors: torch.Tensor) -> torch.Tensor:
    """Append the columns to rows (n, d) that select the terms of `append_term` in a product."""
    extra = vectors.new_zeros((len(vectors), _EXTRA_COLUMNS))
    extra[:, :2] = 1
    return torch.cat([vectors, extra], dim=1)


def compute_max_error(rows: HalfVectors, columns: HalfVectors) -> torch.Tensor:
    """Compute how far each row's sums of products of halves are at most from the exact products, (n,) float64."""
    summing_error = (rows.values.shape[1] + 1) * _SUM_ERROR * rows.half_norms * columns.half_norms.max()
    return rows.half_norms * columns.error_norms.max() + rows.error_norms * columns.norms.max() + summing_error


def relax_limit(limit: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Lower a limit to what a product in half precision reaches at least if the exact one reaches the limit.

    Args:
        limit: float64 (n,).
        error: maximum error, (n,).
        dtype: format of the products.

    Returns:
        float32 (n,).
    """
    before_rounding = limit - error
    info = torch.finfo(dtype)
    # The smallest normal number, for results that are flushed to zero; 2^-20 for the limit's own rounding to float32.
    return (before_rounding - before_rounding.abs() * (info.eps / 2 + 2.0**-20) - info.tiny - 2.0**-30).float()


def compute_min_product(product: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute what the exact product reaches at least, (n,) float64, if `product` (n,) is the one in half precision."""
    wide = product.double()
    info = torch.finfo(dtype)
    return wide - wide.abs() * info.eps - info.tiny - error


class Tile:
    """All products of rows (n, d) and columns (m, d), and the maximum of each group of columns.

    Group g holds the columns g, g + groups, g + 2 groups, ...: maxima over a wide stride are read in full lines. The
    products are in memory once, n * m halves, until the tile is deleted.
    """

    def __init__(self, rows: HalfVectors, columns: HalfVectors, group: int = GROUP):
        # Pad the columns to full groups. The padding becomes -inf, so that no maximum comes from it.
        count = len(columns.values)
        self.groups = -(-count // group)
        padding = self.groups * group - count
        padded = torch.nn.functional.pad(columns.values, (0, 0, 0, padding)) if padding else columns.values
        with _force_single_precision_sums():
            product = rows.values @ padded.T
        if padding:
            product[:, count:] = -torch.inf
        self._dtype = product.dtype
        self._error = compute_max_error(rows, columns)
        # (rows, columns of a group, groups): column c is at [c // groups, c % groups].
        self._product = product.view(len(product), group, self.groups)
        self._maxima = self._product.amax(dim=1)

    def compute_min_kth(self, k: int) -> torch.Tensor:
        """Compute what the k-th largest exact product per row reaches at least, (n,) float64.

        The k largest maxima belong to k different columns. With fewer groups than k the answer is -inf.
        """
        if self.groups < k:
            return torch.full((len(self._maxima),), -torch.inf, dtype=torch.float64, device=self._maxima.device)
        kth = self._maxima.topk(k, dim=1, sorted=True).values[:, -1]
        return compute_min_product(kth, self._error, self._dtype)

    def find_reaching(self, limit: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Find all products whose exact value reaches the limit, and a few that nearly do.

        Args:
            limit: per row, (n,) float64.

        Yields:
            Positions (rows (m,), columns (m,)) in parts of bounded size, with rising rows.
        """
        # Columns that fill up the last groups are -inf, and reach no limit that is finite.
        lowered = relax_limit(limit, self._error, self._dtype).clamp(min=torch.finfo(torch.float32).min)
        reaching_groups = (self._maxima >= lowered[:, None]).view(-1).nonzero().squeeze(1)
        size = self._product.shape[1]
        # Examine the single columns of these groups, a bounded number of groups at a time.
        for at in range(0, len(reaching_groups), _GROUPS_PER_CHUNK):
            chunk = reaching_groups[at : at + _GROUPS_PER_CHUNK]
            row = chunk // self.groups
            group = chunk % self.groups
            inside = (self._product[row, :, group] >= lowered[row, None]).view(-1).nonzero().squeeze(1)
            # Turn flat positions in (groups of the chunk, columns of a group) back into rows and columns.
            which = inside // size
            yield row[which], group[which] + self.groups * (inside % size)


@contextmanager
def _force_single_precision_sums() -> Iterator[None]:
    """Make cuBLAS sum products in single precision, which the bound rests on: it may otherwise add some in half."""
    matmul = torch.backends.cuda.matmul
    # Older releases of torch lack some of them, and do not sum so either.
    before = {name: getattr(matmul, name) for name in _REDUCED_PRECISION_FLAGS if hasattr(matmul, name)}
    try:
        for name in before:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
