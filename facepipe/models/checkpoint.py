"""Public checkpoints: read without executing anything in them, and fitted key by key into our modules."""

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

_WRAPPERS = ("state_dict", "net_state_dict", "model_state_dict", "model", "net")
_DEEPEST = 8
_SHOWN = 5


def read_state(path: str | Path) -> State:
    """The tensors of a .safetensors file, or of a .pth, .pt, .ckpt or .tar that torch wrote, by name, on the CPU.

    A state dict inside a wrapper (`state_dict`, `net_state_dict`) is unwrapped, DataParallel's `module.` taken off.
    Raises WeightsError for a file that is missing, damaged, holds no state dict, or holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"the weights {str(path)!r} are missing")
    if file.suffix == ".safetensors":
        return _safetensors(file)
    return _tensors(_unwrapped(_torch(file)), str(file))


def _safetensors(file: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{str(file)!r} cannot be read as safetensors: {error}") from error


def _torch(file: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():  # torch warns of pickles that it is about to refuse
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{str(file)!r} is refused: it holds more than tensors, and loading that would run code of whoever wrote "
            "it, or it is no checkpoint. Save its state_dict alone, or as safetensors"
        ) from error
    except Exception as error:  # torch's reader raises whatever damaged bytes lead it to
        raise WeightsError(f"{str(file)!r} cannot be read as a checkpoint: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _unwrapped(loaded: Any) -> Any:
    for _ in range(_DEEPEST):  # a wrapper may hold itself
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def _tensors(state: Any, where: str) -> State:
    import torch

    found = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, Mapping) else {}
    if not found:
        raise WeightsError(f"{where!r} holds no state dict")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def load_state(net: "nn.Module", state: State, where: str, ignored: Iterable[str] = ()) -> None:
    """Load a state dict whose names are the module's; batch norms' counters may be absent.

    ignored: prefixes of names that may be left over (a classifier that is not wanted)
    Raises WeightsError that names what is missing, left over, or of another shape.
    """
    wanted = net.state_dict()
    prefixes = tuple(ignored)
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted and not k.startswith(prefixes or ("\0",))]
    shapes = [
        f"{k} {tuple(state[k].shape)} where {tuple(wanted[k].shape)} is wanted"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = [_listed("missing", missing), _listed("left over", extra), _listed("of another shape", shapes)]
    if any(problems):
        raise WeightsError(f"{where} does not fit {type(net).__name__}: " + "; ".join(p for p in problems if p))
    net.load_state_dict({k: state.get(k, wanted[k]) for k in wanted})


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"
