"""Metrics without a gateway: the table and its rules, values from manifests, the page, alerts and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobs.common import Terminated
from rpl.errors import BadInput, TryAgain
from rpl.local import run_all
from rpl.manifests import File, Manifest
from rpl.metrics import METRICS, RunOutcome, run_outcome, stage_metrics
from rpl.metrics.declared import IMAGES, Sample
from rpl.metrics.page import QUERIES, page
from rpl.metrics.reporting import run_name
from rpl.metrics.values import ended, exit_kind, run_metrics
from rpl.reasons import Reason
from rpl.rounds import Node
from rpl.stage import Context, Run
from tests.fake_stages import QUIET, FakeStages, make_run
from tests.pushgateways import Values, name

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "helm/rpl/files"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def promtool(*arguments: object, stdin: str | None = None) -> None:
    command = [str(PROMTOOL), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def values(samples: list[Sample]) -> Values:
    found = {name(s.metric.name, dict(zip(s.metric.labels, s.labels, strict=True))): s.value for s in samples}
    assert len(found) == len(samples), "a value was given twice"
    return found


def manifest(stage: str, files: dict[str, int] | None = None, rows: int = 0, **facts: Any) -> Manifest:
    """A committed shard with files of these sizes, in a folder of its own."""
    committed = {key: File(f"{stage}/attempts/a/{key}", size, "") for key, size in (files or {}).items()}
    return Manifest(
        stage=stage, round=1, shard="0-of-1", digest="", attempt="a", files=committed, rows=rows, facts=facts,
        inputs={}, outside={}, wall_s=2.5, peak_memory_bytes=1000,
    )  # fmt: skip


# The table


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_follows_prometheus_rules(metric: Any) -> None:
    assert re.fullmatch(r"rpl_(stage|sourcing|learning|validation|run)(_[a-z]+)+", metric.name)
    for unit in ("seconds", "bytes", "ratio"):
        assert metric.name.endswith(f"_{unit}") == (metric.unit == unit)
    assert metric.text.endswith(".")
    assert set(metric.labels) <= {"kind", "outcome", "reason", "prompt", "split"}, "few values, whatever is run"


def test_no_metric_is_declared_twice() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_value_needs_the_labels_that_were_declared() -> None:
    assert IMAGES(3, reason="duplicate", outcome="refused").labels == ("refused", "duplicate")
    with pytest.raises(AssertionError, match="rpl_stage_images"):
        IMAGES(3, outcome="refused")


# Values


def test_every_stage_reports_time_rows_bytes_and_memory() -> None:
    one, two = manifest("crop", {"a": 100, "b": 20}), manifest("encode", {"c": 3})
    found = values(stage_metrics(manifest("index", {"x": 7, "y": 8}, rows=9), [one, two, one]))
    assert found == {
        "rpl_stage_duration_seconds": 2.5,
        "rpl_stage_rows": 9,
        "rpl_stage_input_bytes": 123,  # a file that two edges lead to is there once
        "rpl_stage_output_bytes": 15,
        "rpl_stage_peak_memory_bytes": 1000,
    }


COMMON = values(stage_metrics(manifest("crop"), []))


def own(stage: str, **facts: Any) -> Values:
    """What the stage reports beside what all do."""
    found = values(stage_metrics(manifest(stage, **facts), []))
    return {key: value for key, value in found.items() if key not in COMMON}


def test_download_reports_addresses_by_outcome_and_reason() -> None:
    assert own("download", urls=9, ok=5, by_reason={"not_found": 3, "private_address": 1}) == {
        "rpl_stage_images{outcome=ok,reason=}": 5,
        "rpl_stage_images{outcome=failed,reason=not_found}": 3,
        "rpl_stage_images{outcome=refused,reason=private_address}": 1,
    }


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_can_be_reported(reason: Reason) -> None:
    assert own("download", by_reason={reason.value: 1}) == {
        f"rpl_stage_images{{outcome={reason.kind},reason={reason.value}}}": 1
    }


def test_curate_reports_its_yield_and_what_was_measured() -> None:
    facts = {"kept": 30, "target": 40, "categories_full": 2, "by_reason": {"duplicate": 4}, "purity": 0.5}
    assert own("curate", **facts, retrieval_precision=None) == {
        "rpl_stage_images{outcome=kept,reason=}": 30,
        "rpl_stage_images{outcome=refused,reason=duplicate}": 4,
        "rpl_sourcing_kept_images": 30,
        "rpl_sourcing_target_images": 40,
        "rpl_sourcing_full_categories": 2,
        "rpl_sourcing_purity_ratio": 0.5,
    }


def test_learn_reports_loss_and_embed_accuracy() -> None:
    assert own("learn", loss=1.25, text_passes=61) == {"rpl_learning_loss": 1.25, "rpl_learning_text_passes": 61}
    accuracy = {
        "learned": {"base": 0.5, "novel": 0.0},
        "manual": {"base": 0.25, "novel": None},
        "best_manual": {"template": "{name}", "base": 0.375, "novel": None},
        "ensemble": {"base": None, "novel": None},
    }
    assert own("embed", accuracy=accuracy) == {
        "rpl_validation_accuracy_ratio{prompt=learned,split=base}": 0.5,
        "rpl_validation_accuracy_ratio{prompt=learned,split=novel}": 0.0,
        "rpl_validation_accuracy_ratio{prompt=manual,split=base}": 0.25,
        "rpl_validation_accuracy_ratio{prompt=best_manual,split=base}": 0.375,
    }


@pytest.mark.parametrize("stage", ["download", "curate", "learn", "embed"])
def test_facts_that_are_not_there_are_not_reported(stage: str) -> None:
    assert own(stage) == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (None, "done"), (BadInput(""), "bad_input"), (TryAgain(""), "try_again"), (Terminated(), "try_again"),
        (KeyboardInterrupt(), "try_again"), (ZeroDivisionError(), "bug"),
    ],
)  # fmt: skip
def test_how_an_attempt_ended(error: BaseException | None, kind: str) -> None:
    found = values(ended(exit_kind(error), 123.0))
    assert found.pop("rpl_stage_completion_timestamp_seconds") == 123
    assert found.pop("rpl_stage_success") == (kind == "done")
    assert found == {
        f"rpl_stage_exit{{kind={each}}}": each == kind for each in ("done", "bad_input", "try_again", "bug")
    }


def test_the_outcome_of_a_run_is_read_from_what_it_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeStages(monkeypatch)
    fakes.accuracies = [0.5, 0.7, 0.6]

    def count_kept(ctx: Context) -> None:
        if ctx.node.stage == "curate":
            kept = 8 if ctx.node.round == "novel" else 99
            ctx.facts |= {"kept": kept, "target": 10}

    fakes.before_return = count_kept
    run = make_run(tmp_path, str(tmp_path / "run"), rounds={"max_rounds": 3})
    run_all(run, QUIET)
    assert run_outcome(run, succeeded=True, finished=5.0, seconds=4.0) == RunOutcome(
        succeeded=True, finished=5.0, seconds=4.0, rounds=3, best_accuracy={"base": 0.7, "novel": 0.7}, novel_kept=8,
        novel_target=10,
    )  # fmt: skip
    assert values(run_metrics(run_outcome(run, succeeded=True, finished=5.0, seconds=4.0))) == {
        "rpl_run_success": 1,
        "rpl_run_completion_timestamp_seconds": 5,
        "rpl_run_duration_seconds": 4,
        "rpl_run_rounds": 3,
        "rpl_run_best_accuracy_ratio{split=base}": 0.7,
        "rpl_run_best_accuracy_ratio{split=novel}": 0.7,
        "rpl_run_novel_kept_images": 8,
        "rpl_run_novel_target_images": 10,
    }


def test_a_run_that_failed_has_an_outcome_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, str(tmp_path / "run"))
    assert run_outcome(run, succeeded=False, finished=5.0) == RunOutcome(succeeded=False, finished=5.0)
    (tmp_path / "train.json").unlink()  # what broke the run breaks its digests as well
    run = Run(run.uri)
    with pytest.raises(BadInput):
        run.manifests(Node("embed", 1))
    assert run_outcome(run, succeeded=False, finished=5.0) == RunOutcome(succeeded=False, finished=5.0)
    assert values(run_metrics(RunOutcome(succeeded=False, finished=5.0))) == {
        "rpl_run_success": 0,
        "rpl_run_completion_timestamp_seconds": 5,
        "rpl_run_rounds": 0,
    }


@pytest.mark.parametrize(
    ("uri", "expected"),
    [("s3://bucket/runs/first", "first"), ("s3://b/runs/first/", "first"), ("file:///x/runs/first", "first"),
     ("runs/first", "first"), ("first", "first"), ("/", "")],
)  # fmt: skip
def test_the_name_of_a_run(uri: str, expected: str) -> None:
    assert run_name(uri) == expected


def test_a_run_in_the_working_folder_has_that_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_name(".") == tmp_path.name


# The page, the alerts, the dashboard


def expressions() -> dict[str, str]:
    """Every PromQL expression of the alerts, the dashboard and the page, by where it stands."""
    from ruamel.yaml import YAML

    alerts = YAML(typ="safe", pure=True).load((FILES / "alerts.yaml").read_text())
    found = {f"alert {r['alert']}": r["expr"] for group in alerts["groups"] for r in group["rules"]}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard()["templating"]["list"]:
        found[f"variable {variable['name']}"] = str(variable.get("definition", ""))
    return found | {f"page: {question}": query for question, query in QUERIES}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FILES / "dashboard.json").read_text())
    return loaded


def test_the_page_is_made_from_the_table() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == page(), "stale: make docs"
    for metric in METRICS:
        assert f"| `{metric.name}` | gauge | {metric.unit} |" in page()


def test_alerts_dashboard_and_page_ask_for_declared_metrics_with_their_labels() -> None:
    declared = {metric.name: metric for metric in METRICS}
    used = set()
    for where, expression in expressions().items():
        for found in re.findall(r"\b[a-z]+_[a-z_]+\b(?!\s*\()", expression):
            if found.startswith("rpl_"):
                used.add(found)
                assert found in declared, f"{where}: {found}"
        for found, matchers in re.findall(r"\b(rpl_\w+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=|!~)", matchers))
            assert labels <= {*declared[found].labels, "run", "round", "stage", "shard"}, f"{where}: {matchers}"
    assert {"rpl_run_success", "rpl_validation_accuracy_ratio", "rpl_stage_images", "rpl_stage_rows"} <= used


def test_every_alert_says_what_to_do() -> None:
    from ruamel.yaml import YAML

    alerts = YAML(typ="safe", pure=True).load((FILES / "alerts.yaml").read_text())
    tested = YAML(typ="safe", pure=True).load((ROOT / "tests/alerts_test.yaml").read_text())
    cases = [case for test in tested["tests"] for case in test["alert_rule_test"]]
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        assert {"alert", "expr", "for", "labels", "annotations"} == set(rule)
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]}
        assert fires == {True, False}, f"{rule['alert']} has a case where it fires and one where it does not"


def test_the_dashboard_can_be_loaded_anywhere() -> None:
    loaded = dashboard()
    assert (loaded["uid"], "id" in loaded) == ("rpl-runs", False)
    ids = [panel["id"] for panel in loaded["panels"]]
    assert len(set(ids)) == len(ids)
    assert [variable["name"] for variable in loaded["templating"]["list"]] == ["datasource", "run"]
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(loaded["panels"]))
    assert set(sources) == {"${datasource}"}, "no data source of somebody's own Grafana"
    taken: set[tuple[int, int]] = set()
    for panel in loaded["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert all('run=~"$run"' in target["expr"] for target in panel["targets"]), panel["title"]


@needs_promtool
def test_promtool_accepts_the_alerts_and_each_fires_when_it_should() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", FILES / "alerts.yaml")
    promtool("test", "rules", ROOT / "tests/alerts_test.yaml")


@needs_promtool
def test_promtool_can_read_every_expression(tmp_path: Path) -> None:
    queries = [e.replace("$__range", "1h").replace("$run", ".+") for where, e in expressions().items()
               if not where.startswith("variable")]  # fmt: skip
    rules = [{"record": f"test:number{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "rules.yaml")
