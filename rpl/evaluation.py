"""How good prompts and sourced pictures are: accuracy of crops, retrieval precision, purity of what is kept.

Functions on arrays and rows (numpy only); knows nothing of CLIP, pools or stages. `rpl.stages.embed` measures
accuracy with it, `rpl.stages.curate` the other two, against a truth that only labelled pools have.

Letters: N crops, C categories, D dimension of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 8192  # crops scored at once: 8192 x 1203 scores in float64 are 79 MB


def accuracy(
    features_ND: npt.NDArray[Any],
    labels_N: npt.NDArray[np.integer[Any]],
    text_CD: npt.NDArray[Any],
    among_C: npt.NDArray[np.bool_],
) -> float | None:
    """Top-1 accuracy: share of crops whose nearest category, by cosine, is their own.

    Only the categories that `among_C` marks compete, and only their crops count ("base among base").

    Args:
        features_ND: image embeddings of any float type; they need not be normalised.
        labels_N: category of each crop, a row of `text_CD`; other values (such as -1) are left out.
        text_CD: category embeddings of any float type; they need not be normalised.
        among_C: the categories that compete.

    Returns:
        A fraction, or None where no crop counts.
    """
    competing = np.flatnonzero(among_C)
    counted = np.flatnonzero(np.isin(labels_N, competing))
    if not counted.size:
        return None
    text_DK = _unit(text_CD[competing]).T
    hits = 0
    for start in range(0, counted.size, _BLOCK):
        rows = counted[start : start + _BLOCK]
        scores_NK = _unit(features_ND[rows]) @ text_DK
        # Rounded, so that two categories with the same embedding tie on every machine; the first one wins.
        nearest = competing[np.argmax(np.round(scores_NK, 9), axis=1)]
        hits += int(np.count_nonzero(nearest == labels_N[rows]))
    return hits / counted.size


def retrieval_precision(
    category_names: Sequence[str], urls: Sequence[str], truth: Mapping[str, str | None]
) -> float | None:
    """Share of retrieved pictures that show the category they were retrieved for.

    Args:
        category_names: for each retrieved picture, the name it was retrieved for.
        urls: its URL, in the same order.
        truth: URL → name of the category that the picture shows, or None for none of them. One whose URL
            is not a key is left out: nobody knows what it shows.

    Returns:
        A fraction, or None where nothing is known of any picture.
    """
    known = [truth[url] == name for name, url in zip(category_names, urls, strict=True) if url in truth]
    return sum(known) / len(known) if known else None


def purity(category_names: Sequence[str], urls: Sequence[str], truth: Mapping[str, str | None]) -> float | None:
    """Share of kept pictures that show their category: `retrieval_precision` of what curation let through."""
    return retrieval_precision(category_names, urls, truth)


def _unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Rows scaled to length 1, in float64: there no order of summation changes the nearest category."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = rows / np.maximum(norms, np.finfo(np.float64).tiny)
    return unit
