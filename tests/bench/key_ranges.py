"""Listing a prefix of an object store: one lister against eight ranges of keys at a time.

    python tests/bench/key_ranges.py [--objects 200000] [--latency-ms 70]

A server on this machine answers ListObjectsV2 for 1,000 keys a page, each after the stated time, as a store far away
does. It runs in a process of its own. `time to first` is the time to the first entry. Requests are counted by the server.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from bisect import bisect_right
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PAGE = 1000
_ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-11-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;0123456789abcdef&quot;</ETag><Size>100000</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


def make_keys(shape: str, count: int) -> list[str]:
    """Make sorted keys: in eight folders, in one folder by numbers, or in a folder per person."""
    if shape == "eight folders":
        return [f"set/{'abcdefgh'[n * 8 // count]}/IMG_{n:08d}.jpg" for n in range(count)]
    if shape == "numbers":
        return [f"set/IMG_{n:08d}.jpg" for n in range(count)]
    return sorted(f"set/person-{n // 20:06d}/{n % 20:02d}.jpg" for n in range(count))


def serve(shape: str, count: int, latency: float) -> None:
    """Serve ListObjectsV2 of some keys until the process is ended."""
    keys = make_keys(shape, count)
    requests = [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            if self.path == "/requests":
                body = str(requests[0]).encode()
            else:
                requests[0] += 1
                time.sleep(latency)
                after = query.get("continuation-token") or query.get("start-after", "")
                start = bisect_right(keys, after)
                page = keys[start : start + PAGE]
                more = start + PAGE < len(keys)
                token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
                body = (
                    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>b</Name><Prefix>set/</Prefix>'
                    f"<KeyCount>{len(page)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
                    f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}"
                    + "".join(map(_ENTRY.format, page))
                    + "</ListBucketResult>"
                ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def measure(shape: str, count: int, latency: float) -> None:
    """List with one lister and with eight, and print what they took."""
    from facepipe import storage
    from facepipe.storage.key_ranges import list_prefix_in_ranges

    command = [sys.executable, __file__, "--serve", shape, "--objects", str(count), "--latency-ms", str(latency * 1e3)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": "us-east-1",
        }
        storage.open_bucket.cache_clear()
        rates = {}
        requested = 0
        for listers in (1, 8):
            began = time.perf_counter()
            first = 0.0
            listed = set()
            for entry in list_prefix_in_ranges("s3://b/set", listers):
                first = first or time.perf_counter() - began
                listed.add(entry.url)
            seconds = time.perf_counter() - began
            assert len(listed) == count
            rates[listers] = count / seconds
            total = int(urllib.request.urlopen(f"{endpoint}/requests").read())
            print(
                f"{shape:14} {listers} listers: {rates[listers]:8,.0f} keys/s, {total - requested} requests, "
                f"time to first {first:.2f} s",
                flush=True,
            )
            requested = total
        print(f"{shape:14} ratio {rates[8] / rates[1]:.1f}", flush=True)
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=200_000)
    parser.add_argument("--latency-ms", type=float, default=70)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.objects, args.latency_ms / 1e3)
        return
    for shape in ("eight folders", "numbers", "persons"):
        measure(shape, args.objects, args.latency_ms / 1e3)


if __name__ == "__main__":
    main()
