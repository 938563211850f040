"""The one configuration of a run: every setting with its default, its unit and its sentence.

Read from YAML (1.2, duplicate keys refused), frozen into the run as `config.yaml`, handed to stages as `RunConfig`.
Knows nothing of stores or stages. `stages/` name the sections they depend on; a changed section makes exactly those
stages run again. `runtime` is in no stage's digest: it says where and how fast, never what.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rpl.errors import BadInput

Uri = Annotated[str, Field(min_length=1)]
"""`s3://bucket/key`, `file:///path` or a plain path; relative paths count from the config file."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BoxData(Section):
    annotations: Uri = Field(description="COCO or LVIS JSON with the boxes.")
    images: Uri = Field(description="Folder with the images that the JSON names.")


class Data(Section):
    train: BoxData = Field(description="Boxes to learn from; only base categories are used.")
    val: BoxData | None = Field(
        None, description="Boxes to measure accuracy on, base and novel. Absent: a tenth of the crops is held out."
    )
    scaling_factor: float = Field(
        1.0, ge=0, le=10, description="A box is widened by this times its width (height) on each side before cropping."
    )
    min_area: float = Field(20, ge=0, description="Boxes with width x height below this are dropped (pixels).")
    bad_boxes: Literal["refuse", "drop"] = Field(
        "refuse",
        description="At a box without area or outside its image: refuse ends the run, drop leaves the box out and "
        "counts it. COCO's own train2017 has two.",
    )
    crops_per_category: int = Field(200, ge=1, description="Training crops per category at most, drawn by seed.")
    val_crops_per_category: int = Field(50, ge=1, description="At most so many validation crops per category.")


class Categories(Section):
    file: Uri | None = Field(
        None,
        description="Category list: JSON [{name, description, split}], or PromptDet's text form "
        "(`name name_which_is_description`). Absent: the categories of data.train, all base.",
    )
    base: Uri | None = Field(None, description="File of the base categories' zero-based indices (PromptDet's form).")


class Pool(Section):
    vectors: Uri = Field(description="Image embeddings: folder or file (npy, npz, parquet, HDF5).")
    metadata: Uri | None = Field(
        None, description="URLs and captions: folder or file. Absent: found beside the vectors."
    )
    encoder: str | None = Field(
        None, description="The pool's CLIP, as `rpl` names it; checked against clip when given."
    )
    index: Literal["auto", "exact", "ivf"] = Field(
        "auto", description="exact: stream all vectors once; ivf: build a faiss index; auto: ivf from 2 million rows."
    )
    truth: Uri | None = Field(
        None, description="Parquet (url, category): true categories, only to measure precision with."
    )


class Clip(Section):
    model: str = Field("ViT-B-32", min_length=1, description="open_clip model name, or path of its config JSON.")
    pretrained: str | None = Field("openai", description="open_clip tag or weights file; null: random.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Arithmetic of the frozen towers; the short ones are for GPUs."
    )
    views: int = Field(6, ge=1, description="Augmented views per training image; the reference's epochs.")
    view_scale: tuple[float, float] = Field((0.4, 1.0), description="Area of a random resized crop, as a fraction.")

    @property
    def files(self) -> list[str]:
        """Places among `model` and `pretrained`; a model's name or a tag is none."""
        model = [self.model] if self.model.endswith(".json") else []
        weights = self.pretrained
        return model + ([weights] if weights is not None and ("/" in weights or "." in weights) else [])

    @model_validator(mode="after")
    def _scale_in_order(self) -> Clip:
        if not 0 < self.view_scale[0] <= self.view_scale[1] <= 1:
            raise ValueError("view_scale must be two fractions in order, such as [0.4, 1.0]")
        return self


DEFAULT_LAYOUT = "{ctx1} {name} {ctx2} {description}."
"""PromptDet's prompt."""


class Learn(Section):
    schedule: Literal["fast", "reference"] = Field(
        "fast", description="fast: full-batch L-BFGS; reference: SGD, batch 32, an epoch per view, cosine."
    )
    n_ctx1: int = Field(1, ge=1, le=16, description="Context vectors before the name.")
    n_ctx2: int = Field(1, ge=1, le=16, description="Context vectors between name and description.")
    layouts: tuple[str, ...] = Field(
        (DEFAULT_LAYOUT,), min_length=1, max_length=16,
        description="Order of a prompt's parts; of several, a category's embedding is the mean.",
    )  # fmt: skip
    class_specific: bool = Field(
        False, description="Context vectors of its own for each base category (CoOp); novel ones take their mean."
    )
    max_iterations: int = Field(60, ge=0, description="fast: L-BFGS iterations at most.")
    starts: int = Field(
        4, ge=0, le=64, description="fast: random starts that race over ten iterations; the best goes on."
    )
    start_from: Uri | None = Field(
        None,
        description="Prompts that race too: a prompts.safetensors, or the reference's model.pth.tar-N. With starts: 0 "
        "and max_iterations: 0 they are used as they are.",
    )
    balance: float = Field(
        1.0, ge=0, le=1, description="1: every category weighs the same; 0: every image does, as in the reference."
    )
    temperature: float = Field(
        1.0, gt=0, le=100,
        description="The loss divides CLIP's logits by this. 3 where crops are poor, when the report says so.",
    )  # fmt: skip
    holdout: float = Field(0.1, ge=0, lt=1, description="Share of training pictures held out for early stopping.")
    sourced_weight: float = Field(
        0.2, ge=0, description="Weight of a sourced image in the loss, where a crop weighs 1 (as in the reference)."
    )

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Learn:
        if self.starts == 0 and self.start_from is None:
            raise ValueError("starts: 0 needs start_from, or there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _layouts_read_well(self) -> Learn:
        for layout in self.layouts:
            parts = re.findall(r"\{([^{}]*)\}", layout)
            rest = re.sub(r"\{[^{}]*\}", "", layout)
            is_whole = sorted(set(parts) - {"description"}) == ["ctx1", "ctx2", "name"] and len(parts) == len(
                set(parts)
            )
            if not is_whole or "{" in rest or "}" in rest or "description" in parts[:3]:
                raise ValueError(
                    f"layout {layout!r} must hold {{ctx1}}, {{ctx2}} and {{name}} once each, and behind them may hold "
                    "{description}"
                )
        return self


class PerSplit(Section):
    base: int = Field(ge=1)
    novel: int = Field(ge=1)


class Rounds(Section):
    max_rounds: int = Field(3, ge=1, le=20, description="Rounds at most.")
    min_gain: float = Field(0.002, ge=0, le=1, description="Go on while base accuracy rises by more than this.")
    candidates: PerSplit = Field(PerSplit(base=300, novel=500), description="Nearest pool images per category.")
    kept: PerSplit = Field(PerSplit(base=200, novel=300), description="Good images wanted per category.")


class Download(Section):
    timeout_s: float = Field(10, gt=0, description="Whole time for one URL, seconds.")
    retries: int = Field(2, ge=0, le=10, description="Further tries of a URL after 5xx, a reset or a time-out.")
    max_bytes: int = Field(20_000_000, ge=1, description="Larger bodies are cut off and refused.")
    max_pixels: int = Field(50_000_000, ge=1, description="Larger pictures are refused before decoding.")
    max_redirects: int = Field(5, ge=0, le=20)
    min_side: int = Field(64, ge=1, description="Pictures whose shorter side is below this are refused (pixels).")
    max_aspect: float = Field(5.0, ge=1, description="Pictures longer than this times their width are refused.")
    margin: float = Field(1.25, ge=1, description="Fetch kept x margin good pictures, to leave room to curate.")
    resize: Literal["keep", "reference"] = Field(
        "keep", description="keep: shrink only; reference: max_side square, padded with white as in PromptDet."
    )
    max_side: int = Field(1024, ge=16, description="Longer side of a stored picture, pixels.")
    user_agent: str = Field(
        "rpl-image-sourcing", min_length=1, description="Sent with every request; name a contact in it."
    )
    opt_out: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex", "none"),
        description="X-Robots-Tag words that refuse the picture.",
    )
    connections_per_host: int = Field(8, ge=1, le=64)


class Curate(Section):
    phash_distance: int = Field(
        4, ge=0, le=16, description="Pictures whose 64-bit pHash differs in at most so many bits are copies."
    )
    max_urls_per_picture: int = Field(
        3, ge=1, description="Byte-identical pictures behind more URLs than this are placeholders."
    )
    min_score: float = Field(-1.0, ge=-1, le=1, description="Re-scored cosine below this is refused.")


class Evaluate(Section):
    templates: tuple[str, ...] = Field(
        (
            "a photo of {name}",
            "a photo of a {name}.",
            "a cropped photo of a {name}.",
            "a close-up photo of the {name}.",
            "a drawing of a {name}.",
            "a cartoon {name}.",
            "art of a {name}.",
            "itap of a {name}.",
            "a photo of a {name}, which is {description}.",
            "{name}, {description}.",
        ),
        min_length=1,
        description="Hand-written prompts to compare with; the first is the baseline.",
    )

    @model_validator(mode="after")
    def _templates_format(self) -> Evaluate:
        for template in self.templates:
            try:
                template.format(name="", description="")
            except (KeyError, IndexError, ValueError):
                raise ValueError(f"template {template!r} may hold only {{name}} and {{description}}") from None
        return self


class Shards(Section):
    crop: int = Field(1, ge=1, le=999, description="Parts of crop and of the crops' encoding.")
    download: int = Field(1, ge=1, le=999, description="Parts of download and of the sourced images' encoding.")


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = Field(256, ge=1, description="Images per batch in encode.")
    workers: int = Field(2, ge=1, description="Processes that decode and crop.")
    threads: int = Field(32, ge=1, description="Downloads under way at once.")
    resolve: dict[str, str] = Field(
        {}, description="host: address:port, as curl's --resolve; such hosts may be private. For tests and mirrors."
    )


class RunConfig(Section):
    """All settings of one run. Unknown keys are refused."""

    run: Uri = Field(description="Where the run lives: s3://BUCKET/PREFIX/runs/NAME or a folder.")
    previous: Uri | None = Field(
        None,
        description="A finished run to source again from: what it did alike is copied, the addresses that it judged "
        "are not asked again, and the report says what changed.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of every random choice.")
    data: Data
    categories: Categories = Categories()
    pool: Pool
    clip: Clip = Clip()
    learn: Learn = Learn()
    rounds: Rounds = Rounds()
    download: Download = Download()
    curate: Curate = Curate()
    evaluate: Evaluate = Evaluate()
    shards: Shards = Shards()
    runtime: Runtime = Runtime()

    @field_validator("previous")
    @classmethod
    def _is_another(cls, previous: str | None, info: ValidationInfo) -> str | None:
        if previous is not None and previous.rstrip("/") == str(info.data.get("run")).rstrip("/"):
            raise ValueError("it must be another run than `run`")
        return previous

    def settings(self, sections: Iterable[str]) -> dict[str, Any]:
        """These sections as JSON, for a digest or a reader.

        `previous` is there only where it is set: runs from before there was such a key keep their digests.
        """
        found = self.model_dump(mode="json", include=set(sections))
        return {name: value for name, value in found.items() if name != "previous" or value is not None}


def parse_config(text: str, source: str, *, run: str | None = None) -> RunConfig:
    """The configuration in YAML `text`; `source` names the file in messages. `run` counts instead of the text's.

    Raises:
        BadInput: not YAML, a duplicate or unknown key, a value outside its range; the message names key and fix.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        raise BadInput(f"{source}: not valid YAML ({_yaml_problem(error)}); correct the file.") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{source}: holds no settings; start from the file that `rpl init` writes.")
    if run is not None:
        raw["run"] = run
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{source}: {_first_problem(error)}") from error


def load_config(path: Path) -> RunConfig:
    """`parse_config` of a local file, with relative places counted from its folder."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give the path of a config file.") from error
    return absolute(parse_config(text, str(path)), str(path.resolve().parent))


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML text that `parse_config` reads back to an equal object."""
    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = False  # written as themselves, some line separators are read back as spaces
    yaml.width = 1 << 30  # a folded line loses the space at its fold where the text around it is escaped
    yaml.dump(config.model_dump(mode="json"), out)
    return out.getvalue()


def absolute(config: RunConfig, folder: str) -> RunConfig:
    """The same configuration with every relative place made absolute against `folder`, a path or a URI."""
    scheme, separator, rest = folder.rpartition("://")

    def place(value: str | None) -> str | None:
        if value is None or "://" in value:
            return value
        if separator:
            return value if value.startswith("/") else f"{scheme}://{posixpath.normpath(f'{rest}/{value}')}"
        return str((Path(folder) / value).resolve())

    def box_data(section: BoxData | None) -> BoxData | None:
        if section is None:
            return None
        return BoxData(annotations=str(place(section.annotations)), images=str(place(section.images)))

    clip = config.clip
    # A model name or a tag is not a path; only what names a file beside the config is.
    model = place(clip.model) if clip.model.endswith(".json") else clip.model
    pretrained = place(clip.pretrained) if clip.pretrained in clip.files else clip.pretrained
    pool, categories, data = config.pool, config.categories, config.data
    return config.model_copy(
        update={
            "run": place(config.run),
            "previous": place(config.previous),
            "data": data.model_copy(update={"train": box_data(data.train), "val": box_data(data.val)}),
            "categories": categories.model_copy(
                update={"file": place(categories.file), "base": place(categories.base)}
            ),
            "pool": pool.model_copy(update={k: place(getattr(pool, k)) for k in ("vectors", "metadata", "truth")}),
            "clip": clip.model_copy(update={"model": model, "pretrained": pretrained}),
            "learn": config.learn.model_copy(update={"start_from": place(config.learn.start_from)}),
        }
    )


def attribution_file(config: RunConfig) -> str | None:
    """Where the note on the pictures' makers may lie, which the report shows: beside the category list."""
    lists = config.categories.file
    return None if lists is None else lists.rpartition("/")[0] + "/ATTRIBUTION.md"


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors and for the Helm chart."""
    return RunConfig.model_json_schema()


EXAMPLES: dict[str, str] = {
    "run": "runs/first",
    "data.train.annotations": "annotations/train.json",
    "data.train.images": "images/train",
    "data.val": "null",
    "categories.file": "categories.json",
    "pool.vectors": "pool/img_emb",
}
"""What `template` writes for settings without a default, and where the default would mislead."""


def template() -> str:
    """A commented configuration file with every setting at its default; what must be edited has an example's value."""
    lines = ["# A run of RPL. Every setting is here with its default; edit the places, the rest can wait.", ""]
    lines += _template_lines(RunConfig, "", 0)
    return "\n".join(lines) + "\n"


def _template_lines(model: type[BaseModel], prefix: str, depth: int) -> list[str]:
    lines = []
    indent = "  " * depth
    for name, info in model.model_fields.items():
        path = prefix + name
        default = info.get_default(call_default_factory=True)
        kind = info.annotation
        section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        if info.description:
            lines += textwrap.wrap(info.description, 100, initial_indent=indent + "# ", subsequent_indent=indent + "# ")
        if path in EXAMPLES:
            lines.append(f"{indent}{name}: {EXAMPLES[path]}")
        elif section is not None and not isinstance(default, PerSplit):
            lines.append(f"{indent}{name}:")
            lines += _template_lines(section, path + ".", depth + 1)
        else:
            value = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            lines.append(f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}")
        if depth == 0:
            lines.append("")
    return lines


def _yaml_problem(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; remove it or correct its spelling."
    if first["type"] == "missing":
        return f"key {key!r} is missing; add it."
    return f"key {key!r}: {first['msg']}; correct the value."
