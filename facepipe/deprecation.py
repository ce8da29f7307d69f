"""Old names of the public interface, accepted with a warning for one version."""

import warnings


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of a function that has a new name."""
    warnings.warn(
        f"{old} is now {new}; the old name will be removed in the next version", DeprecationWarning, stacklevel=3
    )
