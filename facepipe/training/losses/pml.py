"""Losses and miners of pytorch-metric-learning by name: `pml:MultiSimilarityLoss(alpha=2, beta=50)`.

The library is Kevin Musgrave's (MIT), an optional extra. Its names and arguments are its own.
"""

import ast
import difflib
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from facepipe.errors import ConfigError
from facepipe.extras import require_module

_CALL = re.compile(r"pml:(\w+)(?:\((.*)\))?", re.DOTALL)
# What losses with class weights ask for, and what stands for it here.
_CLASSES = "num_classes"
_DIM = "embedding_size"


@dataclass(frozen=True)
class _Call:
    """A class of the library with arguments.

    Attributes:
        kind: The class.
        arguments: Its arguments by name.
    """

    kind: Any
    arguments: dict[str, Any]

    @property
    def takes_classes(self) -> bool:
        """Whether it learns something per class, and needs no pairs in a batch."""
        return _CLASSES in inspect.signature(self.kind.__init__).parameters


def parse_loss(name: str) -> _Call:
    """Parse the name of a loss, `pml:NAME` or `pml:NAME(argument=value, ...)`.

    Raises:
        ConfigError: There is no such loss, or it has no such argument.
        MissingPackageError: The library is not installed.
    """
    return _parse(name, "losses", "loss.name")


def parse_miner(name: str) -> _Call:
    """Parse the name of a miner; see `parse_loss`."""
    return _parse(name, "miners", "loss.miner")


def _parse(text: str, module: str, setting: str) -> _Call:
    require_module("pytorch_metric_learning", f"{setting}={text!r}")
    import pytorch_metric_learning.losses
    import pytorch_metric_learning.miners

    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{setting}={text!r}: write pml:NAME or pml:NAME(argument=value)")
    classes: Any = getattr(pytorch_metric_learning, module)
    ending = "Miner" if module == "miners" else "Loss"
    names = [name for name in dir(classes) if inspect.isclass(getattr(classes, name)) and ending in name]
    kind = getattr(classes, match[1], None) if match[1] in names else None
    if kind is None:
        similar = difflib.get_close_matches(match[1], names, n=3)
        hint = f"did you mean {', '.join(similar)}?" if similar else f"its {module} are {', '.join(names)}"
        raise ConfigError(f"{setting}={text!r}: pytorch-metric-learning has no {match[1]}: {hint}")
    arguments = _parse_arguments(match[2] or "", setting, text)
    known = inspect.signature(kind.__init__).parameters
    for name in arguments:
        # A class may pass on what it does not name.
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
        if name not in known and not takes_any:
            raise ConfigError(f"{setting}={text!r}: {match[1]} has no argument {name}")
    return _Call(kind, arguments)


def _parse_arguments(text: str, setting: str, whole: str) -> dict[str, Any]:
    """Parse `a=1, b="x"`: numbers, texts, booleans and lists. No program in it is run."""
    try:
        call: Any = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("arguments need names")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{setting}={whole!r}: write argument=value, with numbers or texts: {error}") from error


class MetricLearningLoss(nn.Module):
    """A loss of pytorch-metric-learning, perhaps with a miner, in float32.

    Attributes:
        loss: The library's loss.
        needs_pairs: Whether a batch must hold several faces per person.
        figures: After a forward pass: `mined`, the number of pairs or triplets that the miner chose.
    """

    def __init__(self, name: str, miner: str | None, *, dim: int, classes: int, seed: int):
        """Make a loss.

        Args:
            name: of the loss.
            miner: of the miner, or None.
            dim: length of an embedding.
            classes: number of classes.
            seed: random seed of what the loss learns.

        Raises:
            ConfigError: The library refuses the arguments.
        """
        super().__init__()
        call = parse_loss(name)
        known = inspect.signature(call.kind.__init__).parameters
        given = {key: value for key, value in ((_CLASSES, classes), (_DIM, dim)) if key in known}
        self.needs_pairs = not call.takes_classes
        self.figures: dict[str, Tensor] = {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.loss = _build(call, given | call.arguments, "loss.name", name)
            chosen = None if miner is None else parse_miner(miner)
            self.miner = None if chosen is None else _build(chosen, chosen.arguments, "loss.miner", str(miner))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, from raw embeddings (n, dim) and labels (n,) int64."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            mined = None
            if self.miner is not None:
                mined = self.miner(x, labels)
                self.figures = {"mined": torch.tensor(float(sum(len(part) for part in mined)))}
            loss: Tensor = self.loss(x, labels, mined)
        return loss


def _build(call: _Call, arguments: dict[str, Any], setting: str, text: str) -> Any:
    try:
        return call.kind(**arguments)
    except Exception as error:  # the library checks its arguments by assertions and errors of many kinds
        raise ConfigError(f"{setting}={text!r}: {str(error)[:300] or type(error).__name__}") from error
