"""Products of vectors in half precision, with a proven bound of what rounding does to them.

Whether a product can reach a limit is decided in two levels: the maximum of each group of columns first, single columns
only in the groups that reach it. Nothing that reaches the limit in exact arithmetic is ever missed.

The bound. Let x, y be vectors in single precision, x', y' their halves, p the product as it comes out. Then
|x'y' - xy| = |x'(y' - y) + (x' - x)y| <= |x'| |y' - y| + |x' - x| |y| (Cauchy-Schwarz, all four norms are measured);
products of halves are exact in single precision, and n of them are summed with an error of at most n 2^-22 |x'| |y'|,
in any order, also where sums are truncated, not rounded, as tensor cores do (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1; Fasi et al., PeerJ CS 2021). Rounding the sum to a half is monotonic: what is at
least L becomes at least L less u |L|, with the unit roundoff u of the format. It adds up to some 0.0009 for float16 and
0.006 for bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GROUP = 64  # columns of a group: its maximum is 1/64 of what is read again, and its columns are looked at together
_CHUNK = 1 << 18  # groups whose columns are looked at in one go
_SUM = 2.0**-22
_MORE = 8
_COARSER = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
    "allow_tf32",
)


@dataclass(frozen=True)
class Half:
    """Vectors (n, d) in half precision. norm: of the vectors (n,) in float64; half: norm of their halves; error: norm
    of the difference."""

    values: torch.Tensor
    norm: torch.Tensor
    half: torch.Tensor
    error: torch.Tensor

    def __getitem__(self, part: slice) -> "Half":
        return Half(self.values[part], self.norm[part], self.half[part], self.error[part])

    @classmethod
    def joined(cls, parts: "list[Half]") -> "Half":
        """Several as one."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("values", "norm", "half", "error")))


def default_type(device: str) -> torch.dtype:
    """float16 on a GPU, where it costs what bfloat16 costs and rounds eight times finer; float32 on a CPU."""
    return torch.float16 if device.startswith("cuda") else torch.float32


def halved(vectors: torch.Tensor, kind: torch.dtype) -> Half:
    """Vectors (n, d) float32 rounded to a format, with what the rounding did.

    Of norms of at most some 100: the largest float16 is 65,504, and products must not exceed it.
    """
    values = vectors.to(kind)
    wide = vectors.double()
    rounded = values.double()
    norms = [torch.linalg.vector_norm(x, dim=1) for x in (wide, rounded, rounded - wide)]
    return Half(values, *norms)


def squared_norms(vectors: torch.Tensor) -> torch.Tensor:
    """(n,) float64 of vectors (n, d)."""
    return vectors.double().square().sum(dim=1)


def with_term(vectors: torch.Tensor, term: torch.Tensor | None, kind: torch.dtype) -> torch.Tensor:
    """Vectors (n, d) float32 with 8 columns more: their products with rows of `with_ones` are larger by `term` (n,).

    The term is split in two, of which each is exact in half precision or nearly; eight columns, since tensor cores want
    multiples of eight. Without a term the vectors as they are.
    """
    if term is None:
        return vectors
    more = vectors.new_zeros((len(vectors), _MORE))
    more[:, 0] = term.to(kind).float()
    more[:, 1] = term - more[:, 0]
    return torch.cat([vectors, more], dim=1)


def with_ones(vectors: torch.Tensor) -> torch.Tensor:
    """Rows (n, d) float32 for products with what `with_term` makes."""
    more = vectors.new_zeros((len(vectors), _MORE))
    more[:, :2] = 1
    return torch.cat([vectors, more], dim=1)


def input_error(rows: Half, columns: Half) -> torch.Tensor:
    """(n,) float64: how far a sum of products of halves may be from the exact product, for each row."""
    far, off, large = columns.norm.max(), columns.error.max(), columns.half.max()
    summed = (rows.values.shape[1] + 1) * _SUM * rows.half * large
    return rows.half * off + rows.error * far + summed


def lowered(limit: torch.Tensor, error: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """(n,) float32: what a product in half precision reaches if the exact one reaches the limit (n,) float64."""
    before = limit - error
    info = torch.finfo(kind)
    # The smallest normal number, for results that are flushed to zero; 2^-20 for the limit's own rounding to float32.
    return (before - before.abs() * (info.eps / 2 + 2.0**-20) - info.tiny - 2.0**-30).float()


def certain(value: torch.Tensor, error: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """(n,) float64: what the exact product reaches if the one in half precision is `value` (n,)."""
    wide = value.double()
    info = torch.finfo(kind)
    return wide - wide.abs() * info.eps - info.tiny - error


class Tile:
    """All products of rows (n, d) and columns (m, d), and the maximum of each group of columns.

    Group g holds the columns g, g + groups, g + 2 groups, ...: maxima over a far stride are read in full lines. The
    products are in memory once, n * m halves, until the tile goes.
    """

    def __init__(self, rows: Half, columns: Half, group: int = GROUP):
        count = len(columns.values)
        self.groups = -(-count // group)
        left = self.groups * group - count
        padded = torch.nn.functional.pad(columns.values, (0, 0, 0, left)) if left else columns.values
        with _full_sums():
            product = rows.values @ padded.T
        if left:
            product[:, count:] = -torch.inf
        self._kind, self._error = product.dtype, input_error(rows, columns)
        self._product = product.view(len(product), group, self.groups)
        self._peaks = self._product.amax(dim=1)

    def kth(self, k: int) -> torch.Tensor:
        """(n,) float64: what the k-th largest exact product reaches at least; -inf where there are fewer groups than k.

        The k largest maxima are of k columns.
        """
        if self.groups < k:
            return torch.full((len(self._peaks),), -torch.inf, dtype=torch.float64, device=self._peaks.device)
        return certain(self._peaks.topk(k, dim=1, sorted=True).values[:, -1], self._error, self._kind)

    def reaching(self, limit: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows (m,), columns (m,)) int64 in parts of bounded size, rows rising: all whose exact product reaches the
        row's limit (n,) float64, and a few that are nearly there."""
        # Columns that fill up the last groups are -inf, and reach no limit that is finite.
        low = lowered(limit, self._error, self._kind).clamp(min=torch.finfo(torch.float32).min)
        hot = (self._peaks >= low[:, None]).view(-1).nonzero().squeeze(1)
        for at in range(0, len(hot), _CHUNK):
            chunk = hot[at : at + _CHUNK]
            row, group = chunk // self.groups, chunk % self.groups
            inside = (self._product[row, :, group] >= low[row, None]).view(-1).nonzero().squeeze(1)
            size = self._product.shape[1]
            which = inside // size
            yield row[which], group[which] + self.groups * (inside % size)


@contextmanager
def _full_sums() -> Iterator[None]:
    """Sums of products in single precision, which the bound rests on: cuBLAS may otherwise add some of them in half."""
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _COARSER}
    try:
        for name in _COARSER:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
