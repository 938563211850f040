"""Configuration: every problem is one sentence that names the key and the fix; what is written reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rpl.config import DEFAULT_LAYOUT, RunConfig, dump_config, json_schema, load_config, parse_config, template
from rpl.errors import BadInput
from rpl.rounds import STAGES
from tests.prompt_texts import OTHER_LAYOUTS

MINIMAL = """
run: runs/x
data:
  train: {annotations: a.json, images: images}
pool: {vectors: pool}
"""


def refusal(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse_config(text, "my.yaml")
    return str(caught.value)


def test_defaults_are_the_reference_s() -> None:
    config = parse_config(MINIMAL, "my.yaml")
    assert config.data.scaling_factor == 1.0
    assert config.data.crops_per_category == 200
    assert (config.rounds.candidates.base, config.rounds.kept.base) == (300, 200)
    assert (config.rounds.candidates.novel, config.rounds.kept.novel) == (500, 300)
    assert (config.learn.n_ctx1, config.learn.n_ctx2, config.clip.view_scale) == (1, 1, (0.4, 1.0))


def test_the_template_is_complete_and_valid() -> None:
    text = template()
    config = parse_config(text, "rpl.yaml")
    assert config.learn == RunConfig.model_validate(config.model_dump()).learn
    for section in RunConfig.model_fields:
        assert f"\n{section}:" in text
    assert "# Seed of every random choice." in text


@example(1302, "الكل في المجمو عة", 3.484795471707707)
@given(st.integers(0, 2**31 - 1), st.text(min_size=1, max_size=200), st.floats(0, 10))
def test_configurations_round_trip(seed: int, agent: str, factor: float) -> None:
    config = parse_config(MINIMAL, "my.yaml")
    config = RunConfig.model_validate(
        config.model_dump()
        | {
            "seed": seed,
            "download": {"user_agent": agent},
            "data": config.data.model_dump() | {"scaling_factor": factor},
        }
    )
    assert parse_config(dump_config(config), "again") == config


def test_unknown_key() -> None:
    assert refusal(MINIMAL + "lern: {}\n") == "my.yaml: unknown key 'lern'; remove it or correct its spelling."
    assert (
        refusal(MINIMAL + "learn: {n_ctx: 4}\n")
        == "my.yaml: unknown key 'learn.n_ctx'; remove it or correct its spelling."
    )


def test_missing_key() -> None:
    assert refusal("run: x\npool: {vectors: p}\n") == "my.yaml: key 'data' is missing; add it."


def test_value_outside_its_range() -> None:
    sentence = refusal(MINIMAL + "learn: {n_ctx1: 0}\n")
    assert sentence == ("my.yaml: key 'learn.n_ctx1': Input should be greater than or equal to 1; correct the value.")


def test_template_with_an_unknown_field() -> None:
    sentence = refusal(MINIMAL + "evaluate: {templates: ['a {thing}']}\n")
    assert sentence == (
        "my.yaml: key 'evaluate': Value error, template 'a {thing}' may hold only {name} and {description}; "
        "correct the value."
    )


@pytest.mark.parametrize(
    "layout",
    [
        "{ctx1} {name} {description}.",
        "{ctx1} {name} {ctx2} {name} {description}.",
        "{ctx1} {name} {ctx2} {ctx2}",
        "{ctx1} {name} {ctx2} {description} {description}",
        "{ctx1} {description} {name} {ctx2}",
        "{ctx1} {name} {description} {ctx2}",
        "{ctx1} {name} {ctx2} {ctx3}",
        "{ctx1} {name} {ctx2} {}",
        "{ctx1} {name!r} {ctx2}",
        "{ctx1} {name:>9} {ctx2}",
        "{ctx1} {name} {ctx2} {description",
        "{ctx1} {name} {ctx2} description}",
        "{ctx1} {name} {ctx2} {{description}}",
        "a photo of {name}",
        "",
    ],
)
def test_a_layout_that_is_no_prompt_is_refused(layout: str) -> None:
    layouts = json.dumps(["{ctx1} {name} {ctx2}", layout])
    assert refusal(MINIMAL + f"learn: {{layouts: {layouts}}}\n") == (
        f"my.yaml: key 'learn': Value error, layout {layout!r} must hold {{ctx1}}, {{ctx2}} and {{name}} once each, "
        "and behind them may hold {description}; correct the value."
    )


def test_a_run_has_at_least_one_layout() -> None:
    assert refusal(MINIMAL + "learn: {layouts: []}\n") == (
        "my.yaml: key 'learn.layouts': Tuple should have at least 1 item after validation, not 0; correct the value."
    )


@pytest.mark.parametrize("layout", [DEFAULT_LAYOUT, *OTHER_LAYOUTS])
def test_a_layout_in_any_order_reads_back(layout: str) -> None:
    config = parse_config(MINIMAL + f"learn: {{layouts: {json.dumps([layout])}}}\n", "my.yaml")
    assert config.learn.layouts == (layout,)
    assert parse_config(dump_config(config), "again") == config


def test_duplicate_key_is_not_silently_the_last() -> None:
    assert 'found duplicate key "run"' in refusal(MINIMAL + "run: y\n")


def test_not_yaml() -> None:
    assert refusal("a: [1, 2").startswith("my.yaml: not valid YAML (line ")


def test_empty_file() -> None:
    assert refusal("") == "my.yaml: holds no settings; start from the file that `rpl init` writes."


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_config(tmp_path / "no.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/no.yaml: cannot be read (No such file or directory); give the path of a config file."
    )


def test_relative_places_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(MINIMAL)
    config = load_config(tmp_path / "my.yaml")
    assert config.run == str(tmp_path / "runs/x")
    assert config.data.train.annotations == str(tmp_path / "a.json")
    assert config.pool.vectors == str(tmp_path / "pool")
    assert config.clip.model == "ViT-B-32"
    assert config.clip.pretrained == "openai"


def test_a_run_without_a_previous_one_is_digested_as_before_there_was_such_a_key(tmp_path: Path) -> None:
    config = parse_config(MINIMAL, "my.yaml")
    for stage in STAGES.values():
        old = config.model_dump(mode="json", include={*stage.sections} - {"previous"})
        assert json.dumps(config.settings(stage.sections)) == json.dumps(old)
    (tmp_path / "my.yaml").write_text(MINIMAL + "previous: runs/w\n")
    again = load_config(tmp_path / "my.yaml")
    assert again.previous == str(tmp_path / "runs/w"), "a place, counted from the file"
    named = {name for name, stage in STAGES.items() if "previous" in again.settings(stage.sections)}
    assert named == {"download", "report"}


def test_a_run_is_not_its_own_previous_one() -> None:
    assert refusal(MINIMAL + "previous: runs/x/\n") == (
        "my.yaml: key 'previous': Value error, it must be another run than `run`; correct the value."
    )


def test_schema_describes_every_section() -> None:
    assert set(json_schema()["properties"]) == set(RunConfig.model_fields)
