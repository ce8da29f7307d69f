"""Live metrics of a run on Ray: counters that are increased after each block."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from facepipe.gallery.commits.parts import PartRecord
from facepipe.observe.metrics import LIVE_METRICS, METRICS


@dataclass(frozen=True)
class _Counters:
    """Ray's counters; it exports them as `ray_facepipe_...`."""

    images: Any
    faces: Any
    stage_seconds: Any


def count_block(record: PartRecord) -> None:
    """Count a finished block: images by status, faces, and seconds by stage. Without Ray nothing happens."""
    if not _is_on_ray():
        return
    counters = _create_counters()
    for status, count in record.statuses.items():
        counters.images.inc(count, tags={"status": status})
    if record.faces:
        counters.faces.inc(record.faces)
    for stage, seconds in record.seconds.items():
        if seconds > 0:
            counters.stage_seconds.inc(seconds, tags={"stage": stage})


def _is_on_ray() -> bool:
    """Tell whether this process belongs to a Ray cluster, without loading Ray."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


@lru_cache(maxsize=1)
def _create_counters() -> _Counters:
    from ray.util.metrics import Counter

    counters = [Counter(name, METRICS[name].help, tag_keys=METRICS[name].labels) for name in LIVE_METRICS]
    return _Counters(*counters)
