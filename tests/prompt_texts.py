"""Names and descriptions that are awkward in some way, and prompts of them by the plainest way: as sentences."""

from __future__ import annotations

from pathlib import Path

from rpl.categories import split_name
from rpl.clip import ClipModel

NAMES = ["cat", "bow (weapon)", "don't-know hat", "crème brûlée", "犬", "cat", "fire engine", "bow-tie"]
DESCRIPTIONS = [
    "a small animal", "a weapon (that shoots arrows)", "", "a dessert, of burnt cream & sugar", "もの",
    "a small animal",
    "a large, red vehicle that carries firefighters, ladders and long hoses to wherever something burns", "x",
]  # fmt: skip

OTHER_LAYOUTS = [
    "{ctx1} {name} {ctx2}.",
    "a photo of {ctx1} {name}, {ctx2} {description}",
    "{ctx2} {name} ({ctx1})",
    "{ctx1} {ctx2} {name}: {description}, in the wild",
    "{name}{ctx1}{ctx2}{description}",
]

PROMPTDET = Path(__file__).parents[2] / "shared" / "data" / "promptdet" / "lvis_category_and_description.txt"


def promptdet_texts() -> tuple[list[str], list[str]]:
    """Names and descriptions of PromptDet's 1,203 categories."""
    lines = PROMPTDET.read_text(encoding="utf-8").splitlines()
    names, descriptions = zip(*(split_name(line.split(" ")[-1].strip()) for line in lines), strict=True)
    return list(names), list(descriptions)


def as_sentence(
    clip: ClipModel, layout: str, name: str, description: str, *, n_ctx1: int, n_ctx2: int
) -> tuple[list[int], list[int], list[int]]:
    """Ids of the sentence as CLIP's own tokeniser gives them, and the places of ctx1's and ctx2's vectors in it.

    7 stands for each vector of ctx1 and 8 for each of ctx2: digits are tokens of their own, and no text here has any.
    """
    text = layout.format(ctx1=" 7 " * n_ctx1, ctx2=" 8 " * n_ctx2, name=name, description=description)
    ids: list[int] = clip.tokenise([text])[0].tolist()
    ids = ids[: ids.index(clip.end_token) + 1]
    places = [[at for at, found in enumerate(ids) if [found] == clip.token_ids(digit)] for digit in "78"]
    assert [len(each) for each in places] == [n_ctx1, n_ctx2]
    return ids, places[0], places[1]
