"""A Prometheus Pushgateway: push a group, list the groups, delete some. Knows nothing of stages.

A group is one set of values under grouping labels; a push replaces it whole. Nothing here raises because the gateway
is down, slow or refuses: metrics are worth less than the work they tell of. The first failure of a process is told in
one line, and the others pass in silence.

prometheus_client is imported when there is something to push, so that a process without a gateway does without.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import urllib3

from rpl.metrics.declared import METRICS, Metric, Sample

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

VARIABLE = "RPL_PUSHGATEWAY"
JOB = "rpl"
TIMEOUT_S = 2.0
# So long a process waits for its gateway in all, however many shards it does: one push under way and one more may time
# out. Less than the grace after SIGTERM.
PATIENCE_S = 2 * TIMEOUT_S


class GatewayError(OSError):
    """The gateway answered, but not as one that did what was asked."""


# A JSON answer of another shape than the gateway's is a failure of the gateway as well.
_FAILURES = (OSError, urllib3.exceptions.HTTPError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class PushedGroup:
    """A group that the gateway holds: its grouping labels but for `job`, and the Unix time of its last push."""

    labels: Mapping[str, str]
    pushed: float


class Gateway:
    """The gateway at `url`, with this process' one registry for it.

    Args:
        url: base URL; http is meant where it names no scheme.
    """

    def __init__(self, url: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._has_warned = False
        # `retries=False` follows no redirect either: the gateway is the one that was named.
        self._http = urllib3.PoolManager(timeout=urllib3.Timeout(total=TIMEOUT_S), retries=False)
        self._registry, self._pushed = _registry()
        self._lock = threading.Lock()  # one push at a time: they share the registry
        self._patience_s = PATIENCE_S

    def push(self, group: Mapping[str, str], samples: Sequence[Sample]) -> bool:
        """Replace the values of a group; whether the gateway took them."""
        from prometheus_client import push_to_gateway

        with self._lock:
            self._pushed.samples = samples
            return self._try(
                "pushed", lambda: push_to_gateway(self.url, JOB, self._registry, dict(group), TIMEOUT_S, self._handler)
            )

    def wait_for(self, pushing: threading.Thread) -> None:
        """Wait for a thread that pushes, as long as this process still has patience."""
        began = time.monotonic()
        pushing.join(self._patience_s)
        self._patience_s = max(0.0, self._patience_s - (time.monotonic() - began))

    def groups(self) -> list[PushedGroup]:
        """The groups of this project; none where the gateway does not tell."""
        found: list[PushedGroup] = []

        def ask() -> None:
            answer = json.loads(self._request("GET", f"{self.url}/api/v1/metrics"))
            found.extend(_group(each) for each in answer["data"] if each["labels"].get("job") == JOB)

        self._try("listed", ask)
        return found

    def delete(self, groups: Sequence[PushedGroup]) -> int:
        """Delete groups; how many were, for it stops at the first failure."""
        from prometheus_client import delete_from_gateway

        def delete(group: PushedGroup) -> None:
            delete_from_gateway(self.url, JOB, dict(group.labels), TIMEOUT_S, self._handler)

        for number, group in enumerate(groups):
            if not self._try("deleted", partial(delete, group)):
                return number
        return len(groups)

    def warn(self, what: str, error: Exception) -> None:
        """Say once per process, on standard error, that metrics could not be `what`, and why."""
        if not self._has_warned:
            self._has_warned = True
            reason = " ".join(str(error).split())[:200]
            line = f"Metrics could not be {what} ({VARIABLE}; {reason}); the work goes on without."
            print(line, file=sys.stderr, flush=True)

    def _try(self, what: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except _FAILURES as error:
            self.warn(what, error)
            return False
        return True

    def _handler(
        self, url: str, method: str, timeout: float | None, headers: Sequence[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        """The way in which prometheus_client wants requests to be made; the time-out is the pool's."""
        del timeout
        return lambda: _discard(self._request(method, url, dict(headers), data))

    def _request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> bytes:
        answer = self._http.request(method, url, headers=headers, body=data)
        if answer.status >= 300:
            raise GatewayError(f"status {answer.status} {answer.data[:200].decode(errors='replace')}")
        return answer.data


def gateway() -> Gateway | None:
    """The gateway that the environment names, the same one throughout a process; None where it names none."""
    url = os.environ.get(VARIABLE, "").strip()
    return _gateway(url) if url else None


@lru_cache
def _gateway(url: str) -> Gateway:
    return Gateway(url)


class _Pushed:
    """prometheus_client's collector of whatever samples are to be pushed now.

    Its own Gauge objects would report 0 for what was never measured.
    """

    def __init__(self) -> None:
        self.samples: Sequence[Sample] = ()

    def collect(self) -> list[Any]:
        from prometheus_client.core import GaugeMetricFamily

        families: dict[Metric, GaugeMetricFamily] = {}
        for metric, labels, value in sorted(self.samples, key=lambda sample: METRICS.index(sample.metric)):
            if metric not in families:
                families[metric] = GaugeMetricFamily(metric.name, metric.text, labels=metric.labels)
            families[metric].add_metric(labels, value)
        return list(families.values())


def _registry() -> tuple[CollectorRegistry, _Pushed]:
    from prometheus_client import CollectorRegistry, disable_created_metrics

    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry, pushed = CollectorRegistry(), _Pushed()
    registry.register(pushed)
    return registry, pushed


def _group(answer: Mapping[str, Any]) -> PushedGroup:
    labels = {name: value for name, value in answer["labels"].items() if name != "job"}
    (push_time,) = answer["push_time_seconds"]["metrics"]
    return PushedGroup(labels, float(push_time["value"]))


def _discard(_answer: bytes) -> None:
    pass
