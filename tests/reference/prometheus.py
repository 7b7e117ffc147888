"""A server's metrics, read as Prometheus reads them."""

import re
import time
import urllib.request
from collections.abc import Callable

_LINE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
# No proxy stands between a test and its own server.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_metrics(url: str) -> dict[str, float]:
    """Every sample, by name and, where it has any, its labels as in `name{label="value"}`."""
    with _OPENER.open(url, timeout=10.0) as answer:
        lines = answer.read().decode().splitlines()
    matches = [_LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    return {
        name + (f"{{{labels}}}" if labels else ""): float(value)
        for name, labels, value in (match.groups() for match in matches if match is not None)
    }


def wait_for_metrics(
    url: str, ready: Callable[[dict[str, float]], bool], seconds: float
) -> dict[str, float]:
    """The first samples that are `ready`. Fails after `seconds`, with what is there then."""
    deadline = time.monotonic() + seconds
    while True:
        metrics = read_metrics(url)
        if ready(metrics):
            return metrics
        if time.monotonic() > deadline:
            framesink = {name: value for name, value in metrics.items() if "framesink" in name}
            raise AssertionError(f"not within {seconds:g} s: {framesink}")
        time.sleep(0.1)
