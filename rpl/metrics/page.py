"""The page docs/metrics.md, made from the table of metrics.

For example:

    python -m rpl.metrics.page docs/metrics.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rpl.metrics.declared import METRICS, Metric

QUERIES = (
    ("Accuracy of the learned prompt, by round",
     'max by (run, round, split) (rpl_validation_accuracy_ratio{prompt="learned"})'),
    ("What learning gained over the first hand-written prompt",
     'max by (run, round, split) (rpl_validation_accuracy_ratio{prompt="learned"})\n'
     '  - max by (run, round, split) (rpl_validation_accuracy_ratio{prompt="manual"})'),
    ("Share of the pictures that a round was to find", "rpl_sourcing_kept_images / rpl_sourcing_target_images"),
    ("Why addresses were not used, over all shards, the most frequent first",
     'sort_desc(sum by (run, round, reason) (rpl_stage_images{stage="download", outcome!="ok"}))'),
    ("Seconds of a stage: its slowest shard", "max by (run, round, stage) (rpl_stage_duration_seconds)"),
    ("Rows a second of each shard", "rpl_stage_rows / rpl_stage_duration_seconds"),
    ("Memory that a stage's pod needs at least", "max by (stage) (rpl_stage_peak_memory_bytes)"),
    ("How far the running shards are", "rpl_stage_items_done / rpl_stage_items_expected"),
    ("Seconds since the last progress of what has not ended",
     "time() - rpl_stage_last_progress_timestamp_seconds\n"
     "  unless on (run, round, stage, shard) rpl_stage_completion_timestamp_seconds"),
    ("The last accuracy of each run, also of those whose groups were deleted meanwhile",
     'max by (run, split) (last_over_time(rpl_run_best_accuracy_ratio[30d]))'),
)  # fmt: skip
"""What one wants to know, and how to ask for it in PromQL."""

INTRODUCTION = """\
# Metrics

Made from `rpl/metrics/` by `make docs`; change it there.

With `RPL_PUSHGATEWAY` set to the base URL of a [Pushgateway](https://github.com/prometheus/pushgateway), each stage
that is run as `python -m jobs.STAGE` pushes when a shard starts, at most every 15 seconds while it makes progress, and
when it ends, well or not. A gateway that is down, slow or refuses costs a line of warning and at most four seconds of
a process; without the variable nothing is pushed.

| group | labels beside `job="rpl"` | replaced by | deleted |
|---|---|---|---|
| a shard | `run`, `round`, `stage`, `shard` | each push of it, of the next attempt too | at the run's end |
| a run | `run` | the end of the next run of that name | with what is stale |

`run` is the last part of the run's URI, `round` a number from 1, `novel` or `once`, `shard` as `0-of-4`. Scrape the
gateway with `honor_labels: true`, or Prometheus calls the label `job` by another name.

All metrics are gauges: a batch job pushes what it found and ends, and another attempt starts again at nothing. What a
shard computed is read from its manifest, so one that was found done reports the same values again. Alerts and a Grafana
dashboard on these metrics: `helm/rpl/files/`.
"""


def page() -> str:
    """The whole page, as Markdown."""
    stages = [metric for metric in METRICS if metric.scope == "stage"]
    runs = [metric for metric in METRICS if metric.scope == "run"]
    queries = (f"{question}:\n\n```promql\n{query}\n```\n" for question, query in QUERIES)
    blocks = [
        INTRODUCTION,
        "## Of a shard\n",
        *_table(stages),
        "",
        "## Of a run\n",
        *_table(runs),
        "",
        "## Questions\n",
    ]
    return "\n".join([*blocks, *queries]).rstrip("\n") + "\n"


def _table(metrics: Iterable[Metric]) -> list[str]:
    labels = {metric: ", ".join(f"`{label}`" for label in metric.labels) for metric in metrics}
    return [
        "| name | kind | unit | labels | meaning |",
        "|---|---|---|---|---|",
        *(f"| `{m.name}` | {m.kind} | {m.unit} | {named} | {m.text} |" for m, named in labels.items()),
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
