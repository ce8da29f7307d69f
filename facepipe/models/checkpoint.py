"""Public checkpoints: read them without executing anything, and load them into our modules key by key."""

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

# Keys under which training scripts keep the state dict.
_WRAPPERS = ("state_dict", "net_state_dict", "model_state_dict", "model", "net")
_MAX_DEPTH = 8
_MAX_NAMES_SHOWN = 5


def read_state(path: str | Path) -> State:
    """Read the tensors of a checkpoint by name, on the CPU.

    A state dict inside a wrapper (`state_dict`, `net_state_dict`) is unwrapped. DataParallel's prefix `module.` is
    removed.

    Args:
        path: A .safetensors file, or a .pth, .pt, .ckpt or .tar file that torch wrote.

    Raises:
        WeightsError: The file is missing or damaged, holds no state dict, or holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"the weights {str(path)!r} are missing")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _select_tensors(_unwrap(_read_torch(file)), str(file))


def _read_safetensors(file: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{str(file)!r} cannot be read as safetensors: {error}") from error


def _read_torch(file: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():  # torch warns about pickles that it is about to refuse
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{str(file)!r} is refused: it is not a checkpoint, or it holds more than tensors, and loading that would "
            "run code of whoever wrote it. Save its state_dict alone, or as safetensors"
        ) from error
    except Exception as error:  # torch's reader raises whatever damaged bytes lead it to
        raise WeightsError(f"{str(file)!r} cannot be read as a checkpoint: {_format_error(error)}") from error


def _format_error(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _unwrap(loaded: Any) -> Any:
    for _ in range(_MAX_DEPTH):  # a wrapper may hold itself
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def _select_tensors(loaded: Any, path: str) -> State:
    import torch

    # Only tensors count: checkpoints also hold epochs and optimisers.
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    state = {name: value for name, value in items if isinstance(value, torch.Tensor)}
    if not state:
        raise WeightsError(f"{path!r} holds no state dict")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def load_state(net: "nn.Module", state: State, source: str, ignored: Iterable[str] = ()) -> None:
    """Load a state dict into a module of the same names.

    The counters of batch norms may be absent.

    Args:
        net: The module.
        state: Tensors by name.
        source: What the error message calls the state dict.
        ignored: Prefixes of names that the module need not have, such as those of a classifier.

    Raises:
        WeightsError: Names are missing or unexpected, or tensors have another shape; the message lists them.
    """
    # Collect all that does not fit, so that one error lists it.
    expected = net.state_dict()
    prefixes = tuple(ignored)
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected and not name.startswith(prefixes or ("\0",))]
    misshapen = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [
        _format_names("missing", missing),
        _format_names("left over", unexpected),
        _format_names("of another shape", misshapen),
    ]
    if any(problems):
        raise WeightsError(f"{source} does not fit {type(net).__name__}: " + "; ".join(p for p in problems if p))
    net.load_state_dict({name: state.get(name, expected[name]) for name in expected})


def _format_names(problem: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return f"{len(names)} {problem}: {', '.join(names[:_MAX_NAMES_SHOWN])}{more}"
