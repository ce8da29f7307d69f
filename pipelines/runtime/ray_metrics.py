"""Live metrics of a run on Ray: counters that an actor adds to after each block. Nothing happens outside Ray."""

import sys
from functools import lru_cache
from typing import Any

from facepipe.gallery.commits.parts import Record
from facepipe.observe.metrics import LIVE, NAMES


def observe(record: Record) -> None:
    """Count a finished block: images by status, faces, seconds by stage. Ray exports them as `ray_facepipe_...`."""
    counters = _counters() if _on_ray() else None
    if counters is None:
        return
    images, faces, seconds = counters
    for status, count in record.statuses.items():
        images.inc(count, tags={"status": status})
    if record.faces:
        faces.inc(record.faces)
    for stage, spent in record.seconds.items():
        if spent > 0:
            seconds.inc(spent, tags={"stage": stage})


def _on_ray() -> bool:
    """Whether this process belongs to a Ray cluster; Ray is not loaded to find out."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


@lru_cache(maxsize=1)
def _counters() -> tuple[Any, Any, Any]:
    from ray.util.metrics import Counter

    images, faces, seconds = (Counter(name, NAMES[name].help, tag_keys=NAMES[name].labels) for name in LIVE)
    return images, faces, seconds
