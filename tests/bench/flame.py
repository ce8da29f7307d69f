"""Where embed's time goes: one worker in this process, sampled every few milliseconds, drawn as a flame graph.

    python tests/bench/flame.py photos|lfw|12mp [--set detect.quick_look=0 ...] [--out docs/profiles]

Needs ../shared. photos: the development photos, 8 times over; lfw: 1,500 of LFW-dev's crops; 12mp: twelve of the photos
enlarged to 4000x3000 and saved at quality 90. Prints ms an image and stage. A row of the drawing is a depth of the
call stack, a width the share of the samples; native code shows as the Python function that called it.
"""

import argparse
import html
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

import cv2
from corpus import SHARED, repeated_photos

from facepipe.config import build, parse_settings
from pipelines.embed import EmbedConfig, EmbedSummary, run

_EVERY = 0.004  # seconds
_WIDTH, _ROW = 1000, 17
Stack = tuple[str, ...]


def corpus(what: str, folder: Path) -> str:
    """A folder of images."""
    if what == "photos":
        return str(repeated_photos(folder, 8))
    if what == "lfw":
        for path in sorted((SHARED / "data" / "lfw-dev" / "images").glob("*/*.jpg"))[:1500]:
            (folder / path.name).symlink_to(path)
        return str(folder)
    for path in sorted((SHARED / "data" / "photos-dev").glob("*.jpg"))[:12]:
        large = cv2.resize(cv2.imread(str(path)), (4000, 3000), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / path.name), large, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return str(folder)


class Sampler(threading.Thread):
    """Counts what the main thread is doing."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stacks: Counter[Stack] = Counter()
        self._main, self.done = threading.main_thread().ident, threading.Event()

    def run(self) -> None:
        while not self.done.wait(_EVERY):
            frame = sys._current_frames().get(self._main or 0)
            self.stacks[tuple(reversed(list(_names(frame))))] += 1


def _names(frame: FrameType | None) -> "list[str]":
    names = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{Path(code.co_filename).stem}.{code.co_qualname}")
        frame = frame.f_back
    return names


def drawn(stacks: Counter[Stack], title: str) -> str:
    """An SVG; from the first function of facepipe's chain on."""
    rows: list[str] = []
    deepest = _draw({stack: n for stack, n in stacks.items() if stack}, (0.0, float(_WIDTH)), 0, rows)
    height = (deepest + 3) * _ROW
    style = "text{font:11px sans-serif;fill:#222}rect{stroke:#fff;stroke-width:.5}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"><style>{style}</style>'
    return f'{head}<text x="4" y="13">{html.escape(title)}</text>{"".join(rows)}</svg>\n'


def _draw(stacks: dict[Stack, int], place: tuple[float, float], depth: int, rows: list[str]) -> int:
    """Draw calls side by side, the widest first, and what they call below them; the deepest row drawn."""
    left, width = place
    total, deepest = sum(stacks.values()), depth
    callers: dict[str, dict[Stack, int]] = {}
    for stack, n in stacks.items():
        if stack:
            inner = callers.setdefault(stack[0], {})
            inner[stack[1:]] = inner.get(stack[1:], 0) + n
    for name, inner in sorted(callers.items(), key=lambda item: -sum(item[1].values())):
        share = sum(inner.values()) / total * width
        if share >= 2:
            rows.append(_box(name, (left, share), depth, share / _WIDTH))
            deepest = max(deepest, _draw(inner, (left, share), depth + 1, rows))
        left += share
    return deepest


def _box(name: str, place: tuple[float, float], depth: int, share: float) -> str:
    left, width = place
    y = (depth + 1) * _ROW + 4
    hue = sum(map(ord, name.split(".")[0])) * 37 % 360
    label = html.escape(name if len(name) * 6 < width else name.rsplit(".", 1)[-1])
    text = f'<text x="{left + 3:.1f}" y="{y + 12}">{label}</text>' if len(label) * 6 < width else ""
    box = f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{_ROW}" fill="hsl({hue} 60% 78%)"/>'
    return f"<g><title>{html.escape(name)}: {share:.1%}</title>{box}{text}</g>"


def inside(stacks: Counter[Stack], function: str) -> Counter[Stack]:
    """The samples within a function, seen from there."""
    found: Counter[Stack] = Counter()
    for stack, n in stacks.items():
        at = next((k for k, name in enumerate(stack) if name.endswith(function)), None)
        if at is not None:
            found[stack[at:]] += n
    return found


def profiled(source: str, settings: list[str]) -> tuple[EmbedSummary, Counter[Stack]]:
    """The second of two runs, when everything is loaded and warm."""
    layers = {"source": {"uri": source}, "run": {"runner": "inline", "workers": 1}}
    config = build(EmbedConfig, parse_settings(settings), layers)
    with tempfile.TemporaryDirectory() as folder:
        run(config, f"{folder}/first")
        sampler = Sampler()
        sampler.start()
        summary = run(config, f"{folder}/second")
        sampler.done.set()
        sampler.join()
    return summary, sampler.stacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("photos", "lfw", "12mp"))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary, stacks = profiled(corpus(args.what, Path(folder)), args.settings)
    each = {name: seconds / summary.images * 1e3 for name, seconds in summary.stage_seconds.items()}
    shown = ", ".join(f"{name} {ms:.1f}" for name, ms in each.items())
    title = f"{args.what}{''.join(f', {s}' for s in args.settings)}: {sum(each.values()):.1f} ms an image on a core ({shown})"
    print(title)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        name = "-".join([args.what, *(s.replace("=", "-") for s in args.settings)])
        Path(args.out, f"{name}.svg").write_text(drawn(inside(stacks, "BlockWorker.__call__"), title), encoding="utf-8")


if __name__ == "__main__":
    main()
