"""The loss of prompts on cached image features, with its gradient in closed form.

    L = sum_i w_i / V sum_v  -log softmax_c( s cos(x_iv, t_c) )[y_i]  /  sum_i w_i,      x: views, t: text features

(equation 3 of PromptDet, Feng et al. 2022, over all V views of an image). Its gradient by t needs only the softmax:
dL/du_c = s sum_iv w_i (p_ivc - [c = y_i]) x_iv for the normalised u_c, then the projection that normalising adds. So
views stream through in blocks, no graph is kept for them, and memory does not grow with their number.
Knows nothing of prompts, towers or optimisers.

Letters: N images, V views, C categories, D dimension of the shared space, B views of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from rpl.ranks import ALONE, Ranks

# On a CPU 4 MB, so that a block stays in a core's cache; on a GPU 256 MB, so that starting it costs little.
_LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
_LANES = 16  # parts at most that ranks share out; sums run over them in order


@dataclass(frozen=True)
class CachedViews:
    """Image features to learn from."""

    features: Tensor
    """[N, V, D], any float type, of length 1."""
    labels: Tensor
    """int64 [N], the row of the image's category among the text features."""
    weights: Tensor
    """float32 [N], share in the loss."""

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows_N: Tensor) -> CachedViews:
        return CachedViews(self.features[rows_N], self.labels[rows_N], self.weights[rows_N])

    def narrowed(self, categories: npt.NDArray[np.int64]) -> CachedViews:
        """The images of some categories, which are renumbered in the given order."""
        number_C = torch.full((int(max(categories.max(), int(self.labels.max()))) + 1,), -1)
        number_C[torch.from_numpy(categories)] = torch.arange(len(categories))
        labels = number_C.to(self.labels.device)[self.labels]
        rows = torch.nonzero(labels >= 0)[:, 0]
        return CachedViews(self.features[rows], labels[rows], self.weights[rows])

    def thinned(self, most: int) -> CachedViews:
        """Fewer views of each image, by turns other ones, such that all together are `most` if each keeps one."""
        count_N, count_V = self.features.shape[:2]
        kept = max(1, min(count_V, most // max(1, count_N)))
        if kept == count_V:
            return self
        rows = torch.arange(count_N, device=self.features.device)[:, None]
        turns = (rows + torch.arange(kept, device=rows.device)) % count_V
        return CachedViews(self.features[rows, turns], self.labels, self.weights)

    def balanced(self, balance: float) -> CachedViews:
        """The same with weights divided by their category's sum to the power `balance`, scaled to a mean of 1.

        0 leaves every image its own weight, 1 gives every category the same. Validation counts categories alike and
        novel ones have no images at all, so what the commonest categories like best is not what is wanted.
        """
        sums_C = torch.zeros(int(self.labels.max()) + 1, dtype=torch.float64)
        sums_C.index_add_(0, self.labels, self.weights.double())
        weights = self.weights.double() * sums_C[self.labels] ** -balance
        return CachedViews(self.features, self.labels, (weights / weights.mean()).float())

    def to(self, device: torch.device) -> CachedViews:
        return CachedViews(self.features.to(device), self.labels.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Scores:
    """Weighted means over all views: cross-entropy, share of views whose nearest category is right."""

    loss: float
    accuracy: float
    gradient: Tensor | None
    """dL/dt [C, D], float32; None unless it was asked for."""


@torch.no_grad()
def score(
    text_CD: Tensor, views: CachedViews, logit_scale: float, *, with_gradient: bool = False, ranks: Ranks = ALONE
) -> Scores:
    """The loss of text features (float32, not normalised) on `views`, and its gradient by them.

    `ranks` share the views out; each calls with the same ones.
    """
    lengths_C1 = text_CD.norm(dim=1, keepdim=True)
    unit_CD = text_CD / lengths_C1
    logits = _LOGITS_AT_ONCE.get(text_CD.device.type, _LOGITS_AT_ONCE["cpu"])
    at_once = max(1, logits // (views.features.shape[1] * len(text_CD)))
    blocks = torch.split(torch.arange(len(views), device=text_CD.device), at_once)
    lanes = [lane.tolist() for lane in np.array_split(np.arange(len(blocks)), min(_LANES, len(blocks)))]
    owners = ranks.owners([len(lane) for lane in lanes])
    share_N = views.weights.double() / (views.weights.double().sum() * views.features.shape[1])
    sums, gradients = [], []
    for lane, owner in zip(lanes, owners, strict=True):
        sums.append(torch.zeros(2, dtype=torch.float64, device=text_CD.device))
        if with_gradient:
            gradients.append(torch.zeros_like(unit_CD))
        if owner == ranks.index:
            for block in lane:
                _add_block(
                    unit_CD, views, blocks[block], share_N, logit_scale=logit_scale, sums=sums[-1],
                    gradient_CD=gradients[-1] if with_gradient else None,
                )  # fmt: skip
    ranks.hand_out(sums, owners)
    loss, hits = torch.stack(sums).sum(0).tolist()
    if not with_gradient:
        return Scores(loss, hits, None)
    ranks.hand_out(gradients, owners)
    gradient_CD = gradients[0]
    for gradient in gradients[1:]:
        gradient_CD += gradient
    along_C1 = (gradient_CD * unit_CD).sum(1, keepdim=True)
    return Scores(loss, hits, (gradient_CD - along_C1 * unit_CD) / lengths_C1)


def _add_block(
    unit_CD: Tensor, views: CachedViews, rows: Tensor, share_N: Tensor, *, logit_scale: float,
    sums: Tensor, gradient_CD: Tensor | None,
) -> None:  # fmt: skip
    """Add the images at `rows` to [loss, hits] and to the gradient by the normalised text features."""
    count_V = views.features.shape[1]
    views_BD = views.features[rows].reshape(-1, views.features.shape[2]).float()
    labels_B = views.labels[rows].repeat_interleave(count_V)
    share_B = share_N[rows].repeat_interleave(count_V)
    logits_BC = (views_BD @ unit_CD.T).mul_(logit_scale)
    hits = ((logits_BC.argmax(1) == labels_B) * share_B).sum()
    log_p_BC = functional.log_softmax(logits_BC, dim=1)
    loss = -(log_p_BC.gather(1, labels_B[:, None])[:, 0] * share_B).sum()
    sums += torch.stack([loss, hits])
    if gradient_CD is not None:
        error_BC = log_p_BC.exp_()
        error_BC[torch.arange(len(labels_B), device=labels_B.device), labels_B] -= 1
        gradient_CD.addmm_(error_BC.mul_((share_B * logit_scale).float()[:, None]).T, views_BD)
