"""Writes what the chart says twice: the tables of its README.md, the descriptions of its values.schema.json.

    python helm/values_table.py         (make chart)

The sentences are the `# --` comments of helm/rpl/values.yaml, the stages' resources those of argo/templates/. Knows
nothing of Helm; a test fails where the written files are not what this would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "rpl"


class Value(NamedTuple):
    """One documented value; `key` has a dot between its parts."""

    key: str
    default: Any
    sentence: str


def documented(text: str) -> Iterator[Value]:
    """The values of a values.yaml whose key follows a `# --` comment, in their order."""
    defaults = YAML(typ="safe", pure=True).load(text)
    parents: list[tuple[int, str]] = []
    sentence: list[str] = []
    for line in text.splitlines():
        comment = re.match(r" *# (--)? *(.*)", line)
        key = re.match(r"( *)([A-Za-z0-9]+):", line)
        if comment and (comment[1] or sentence):
            sentence.append(comment[2])
        elif key:
            while parents and parents[-1][0] >= len(key[1]):
                parents.pop()
            parents.append((len(key[1]), key[2]))
            if sentence:
                path = [name for _, name in parents]
                default = defaults
                for name in path:
                    default = default[name]
                yield Value(".".join(path), default, " ".join(sentence))
            sentence = []


def values_table(values: list[Value]) -> str:
    lines = ["| value | default | |", "|---|---|---|"]
    for key, default, sentence in values:
        shown = json.dumps(default, ensure_ascii=False) if default != "" else '""'
        lines.append(f"| `{key}` | `{shown}` | {_cell(sentence)} |")
    return "\n".join(lines)


def resources_table(folder: Path) -> str:
    """What each stage's pod asks for and may take, from the WorkflowTemplates."""
    lines = ["| stage | requests | limits |", "|---|---|---|"]
    for path in sorted(folder.glob("*.yaml")):
        for template in YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["spec"]["templates"]:
            if "container" in template:
                resources = template["container"]["resources"]
                asks, takes = (
                    f"{resources[kind]['cpu']} CPU, {resources[kind]['memory']}" for kind in ("requests", "limits")
                )
                lines.append(f"| {template['name']} | {asks} | {takes} |")
    return "\n".join(lines)


def readme(text: str, tables: dict[str, str]) -> str:
    """`text` with each table between its two marks."""
    for name, table in tables.items():
        marks = rf"(<!-- {name}, written by helm/values_table.py -->\n).*?(<!-- end -->)"
        between = table.replace("\\", r"\\")
        text, found = re.subn(marks, rf"\g<1>{between}\n\g<2>", text, flags=re.DOTALL)
        assert found == 1, f"README.md needs the marks of {name} once"
    return text


def schema(text: str, values: list[Value]) -> str:
    """The schema with the sentences as descriptions."""
    loaded = json.loads(text)
    for key, _, sentence in values:
        node = loaded
        for name in key.split("."):
            node = node["properties"][name]
        rest = dict(node)
        node.clear()
        node.update({"description": sentence} | {name: value for name, value in rest.items() if name != "description"})
    return json.dumps(loaded, indent=2, ensure_ascii=False) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def written() -> dict[Path, str]:
    """The files and what is to be in them."""
    values = list(documented((CHART / "values.yaml").read_text(encoding="utf-8")))
    tables = {"values": values_table(values), "resources": resources_table(ROOT / "argo" / "templates")}
    return {
        CHART / "README.md": readme((CHART / "README.md").read_text(encoding="utf-8"), tables),
        CHART / "values.schema.json": schema((CHART / "values.schema.json").read_text(encoding="utf-8"), values),
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
