"""What a workflow of argo/templates would run, and in which order, worked out from the YAML as data.

Follows the little of Argo's language that the templates use: dag and steps, templateRef, withSequence, `when`, and
parameters in double braces. Outputs are given by the test instead of by pods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[1] / "argo"


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return found


def templates() -> dict[str, dict[str, Any]]:
    """WorkflowTemplates by name."""
    found = (load(path) for path in sorted((FOLDER / "templates").glob("*.yaml")))
    return {each["metadata"]["name"]: each for each in found}


@dataclass(frozen=True)
class Pod:
    """A pod that would run: the WorkflowTemplate it is of, and its container's arguments."""

    template: str
    args: tuple[str, ...]


@dataclass
class Expansion:
    """Pods in an order in which they could run, each with all that must have ended before it."""

    outputs: Callable[[str, Mapping[str, str]], Mapping[str, str]]
    """Output parameters of a pod, by its template's name and its inputs."""
    before: dict[Pod, frozenset[Pod]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._documents = templates()

    def run(
        self, document: str, name: str, inputs: Mapping[str, str], after: frozenset[Pod]
    ) -> tuple[frozenset[Pod], dict[str, str]]:
        """Expand one template; the pods that have ended with it (those of `after` included), and its outputs."""
        template = next(each for each in self._documents[document]["spec"]["templates"] if each["name"] == name)
        declared = template.get("inputs", {}).get("parameters", [])
        values = {each["name"]: str(inputs.get(each["name"], each.get("value"))) for each in declared}
        scope = {f"inputs.parameters.{key}": value for key, value in values.items()}
        if "container" in template:
            pod = Pod(document, tuple(substitute(arg, scope) for arg in template["container"]["args"]))
            assert pod not in self.before, f"{pod} would run twice"
            self.before[pod] = after
            found = dict(self.outputs(document, values)) if "outputs" in template else {}
            assert set(found) == {each["name"] for each in template.get("outputs", {}).get("parameters", [])}
            return after | {pod}, found
        if "steps" in template:
            return self._steps(document, template["steps"], scope, after), {}
        return self._dag(document, template["dag"]["tasks"], scope, after), {}

    def _steps(self, document: str, groups: Any, scope: dict[str, str], after: frozenset[Pod]) -> frozenset[Pod]:
        for group in groups:
            ended = after
            for step in group:
                ended |= self._one(document, step, scope, after, f"steps.{step['name']}")
            after = ended
        return after

    def _dag(self, document: str, tasks: Any, scope: dict[str, str], after: frozenset[Pod]) -> frozenset[Pod]:
        ended: dict[str, frozenset[Pod]] = {}
        for task in tasks:  # written in an order in which they can run
            needs = [name.strip() for name in task.get("depends", "").split("&&") if name.strip()]
            first = after.union(*(ended[name] for name in needs))
            ended[task["name"]] = self._one(document, task, scope, first, f"tasks.{task['name']}")
        return after.union(*ended.values())

    def _one(self, document: str, step: Any, scope: dict[str, str], after: frozenset[Pod], path: str) -> frozenset[Pod]:
        if "when" in step:
            left, right = substitute(step["when"], scope).split("==")
            if left.strip() != right.strip():
                return after
        reference = step.get("templateRef", {"name": document, "template": step.get("template")})
        count = substitute(step["withSequence"]["count"], scope) if "withSequence" in step else None
        ended = after
        for item in range(int(count)) if count is not None else [None]:
            inner = scope if item is None else {**scope, "item": str(item)}
            given = {
                each["name"]: substitute(each["value"], inner)
                for each in step.get("arguments", {}).get("parameters", [])
            }
            wanted = self._documents[reference["name"]]["spec"]["templates"]
            known = {
                each["name"]
                for t in wanted
                if t["name"] == reference["template"]
                for each in t.get("inputs", {}).get("parameters", [])
            }
            assert set(given) <= known, f"{path} gives {set(given) - known}, which nobody reads"
            pods, outputs = self.run(reference["name"], reference["template"], given, after)
            ended |= pods
            scope.update({f"{path}.outputs.parameters.{key}": value for key, value in outputs.items()})
        return ended


def substitute(text: str, scope: Mapping[str, str]) -> str:
    """`text` with what stands in double braces worked out; the workflow's own parameters stay as they are."""

    def value(match: re.Match[str]) -> str:
        inside = match[1]
        if inside.startswith("workflow."):
            return match[0]
        sum_ = re.fullmatch(r"=asInt\(([a-z.-]+)\) \+ 1", inside)
        return str(int(scope[sum_[1]]) + 1) if sum_ else scope[inside]

    return re.sub(r"\{\{(.*?)\}\}", value, text)
