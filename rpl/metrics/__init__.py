"""Metrics of runs and stages, for Prometheus, by way of the Pushgateway that RPL_PUSHGATEWAY names.

    declared   the table of metrics: start here          gateway     a Pushgateway: push, list, delete
    values     a manifest's, an outcome's values         reporting   who is told when
    page       docs/metrics.md, made from the table

Without RPL_PUSHGATEWAY nothing happens. With it nothing fails because of it, and no stage waits for it.
"""

from __future__ import annotations

from rpl.metrics.declared import METRICS
from rpl.metrics.reporting import delete_groups, delete_stale_groups, observed, push_run
from rpl.metrics.values import RunOutcome, run_outcome, stage_metrics

__all__ = [
    "METRICS", "RunOutcome", "delete_groups", "delete_stale_groups", "observed", "push_run", "run_outcome",
    "stage_metrics",
]  # fmt: skip
