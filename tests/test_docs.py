"""The README is true: its targets, commands, files and links exist, and its table is the demo's kind of table."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from jobs.cli import main
from rpl.rounds import STAGES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/metrics.md"]


def test_every_make_target_named_exists() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([a-z0-9-]+)", listed, re.M))
    for page in PAGES:
        named = set(re.findall(r"`?make ([a-z0-9-]+)", (ROOT / page).read_text())) - {"it"}
        assert named <= targets, page


def test_every_command_is_in_the_readme_or_the_changelog_and_none_is_invented() -> None:
    named = set(re.findall(r"(?:^|`)rpl ([a-z]+)", README, re.M))
    assert named <= set(main.commands)
    text = README + (ROOT / "CHANGELOG.md").read_text()
    for command in main.commands:
        assert re.search(rf"\b{command}\b", text), f"{command} is not documented"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_paths_in_the_layout_exist() -> None:
    layout = README.split("## Layout, in reading order")[1]
    for path in re.findall(r"`((?:rpl|jobs|benchmarks)/[\w/.]*)`", layout):
        assert (ROOT / path).exists(), path


def test_the_flow_names_every_stage() -> None:
    flow = README.split("## How a run flows")[1].split("## ")[0]
    assert all(stage in flow for stage in STAGES)


def test_no_blank_was_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
