"""Learning on a small problem whose answer is known: prompts hidden in the features, found again by both schedules."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpl.clip import ClipModel
from rpl.config import DEFAULT_LAYOUT, Learn
from rpl.errors import BadInput
from rpl.learning import Learned, Task, fast, hold_out, initial_contexts, learn, reference, step_limit
from rpl.learning.reference import rate
from rpl.objective import CachedViews, score
from tests.clip_models import make_clip
from tests.learning_tasks import SCALE, make_task
from tests.prompt_texts import OTHER_LAYOUTS

QUIET: Callable[[object], None] = lambda _step: None  # noqa: E731


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def task(clip: ClipModel) -> Task:
    return make_task(clip)


def run(task: Task, schedule: str = "fast", seed: int = 0, max_iterations: int = 60) -> Learned:
    settings = Learn.model_validate({"schedule": schedule, "max_iterations": max_iterations})
    return learn(task, settings, seed, QUIET)


def test_fast_is_at_least_as_good_as_the_reference_in_fewer_passes(task: Task) -> None:
    quick, slow = run(task), run(task, "reference")
    assert quick.kept.loss < 0.5 * quick.history[0].loss
    assert quick.kept.holdout_accuracy is not None and quick.history[0].holdout_accuracy is not None
    assert quick.kept.holdout_accuracy > quick.history[0].holdout_accuracy + 0.2

    text_CD = task.bank.features(slow.context)
    assert task.holdout is not None
    found = score(text_CD, task.holdout, SCALE)
    assert found.loss < quick.history[0].holdout_loss  # type: ignore[operator]
    assert quick.kept.holdout_accuracy >= found.accuracy
    assert quick.kept.holdout_loss <= found.loss  # type: ignore[operator]
    assert slow.history[-1].passes == 3 * 256 // 32
    assert quick.history[-1].passes < 100


@pytest.mark.parametrize("schedule", ["fast", "reference"])
def test_the_same_bytes_twice_and_whatever_the_threads(task: Task, schedule: str) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            learned = run(task, schedule, max_iterations=8)
            found.append((learned.context.numpy().tobytes(), [step.to_json() for step in learned.history]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_the_seed_draws_start_and_order(task: Task) -> None:
    assert torch.equal(initial_contexts(2, 3, 4, 1), initial_contexts(2, 3, 4, 1))
    assert not torch.equal(initial_contexts(2, 3, 4, 1), initial_contexts(2, 3, 4, 2))
    assert torch.equal(initial_contexts(5, 3, 4, 1)[:2], initial_contexts(2, 3, 4, 1))
    assert float(initial_contexts(1, 50, 200, 0).std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(run(task, "reference", seed=1).context, run(task, "reference", seed=2).context)


def test_history_has_every_step_and_counts_passes(task: Task) -> None:
    seen: list[object] = []
    learned = learn(replace(task, starts=task.starts[:1]), Learn(max_iterations=5), 0, seen.append)
    assert learned.history == seen
    assert [step.step for step in learned.history] == [0, 1, 2, 3, 4, 5]
    passes = [step.passes for step in learned.history]
    assert passes[0] == 1 and all(after > before for before, after in itertools.pairwise(passes))
    losses = [step.loss for step in learned.history]
    assert losses == sorted(losses, reverse=True)
    line = learned.history[1].to_json()
    assert list(line) == ["step", "passes", "loss", "accuracy", "holdout_loss", "holdout_accuracy"]
    assert json.loads(json.dumps(line)) == line


def test_it_stops_early_and_keeps_the_step_that_was_best_on_held_out_crops(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task.holdout is not None
    wrong = replace(task.holdout, labels=task.holdout.labels.flip(0))  # what helps the crops, hurts these
    monkeypatch.setattr(fast, "PATIENCE", 3)
    learned = run(replace(task, holdout=wrong))
    losses = [step.holdout_loss for step in learned.history]
    best = losses.index(min(losses))  # type: ignore[type-var]
    assert learned.kept == learned.history[best]
    assert learned.history[-1].step == best + 3 < 60
    text_CD = task.bank.features(learned.context)
    assert score(text_CD, wrong, SCALE).loss == pytest.approx(losses[best], rel=1e-5)


def test_without_held_out_crops_the_last_step_is_kept(task: Task) -> None:
    learned = run(replace(task, holdout=None), max_iterations=4)
    assert learned.kept == learned.history[-1]
    assert learned.kept.holdout_loss is None and learned.kept.step == 4


@pytest.mark.parametrize("schedule", ["fast", "reference"])
def test_a_loss_that_is_no_number_stops_with_a_sentence(task: Task, schedule: str) -> None:
    with pytest.raises(BadInput) as caught:
        run(replace(task, starts=torch.full_like(task.starts, torch.nan)), schedule)
    assert str(caught.value) == (
        "learning: the loss is nan in text pass 1; set clip.precision to fp32, and if it is, look for broken weights "
        "in clip.pretrained."
    )


def test_weights_count(task: Task) -> None:
    """Images of a wrong category change nothing when they weigh next to nothing."""
    wrong = replace(task.train, labels=task.train.labels.roll(32), weights=torch.full((256,), 1e-7))
    mixed = replace(
        task,
        train=CachedViews(*(torch.cat([getattr(task.train, name), getattr(wrong, name)]) for name in vars(wrong))),
    )
    plain, found = run(task, max_iterations=3), run(mixed, max_iterations=3)
    assert found.kept.loss == pytest.approx(plain.kept.loss, rel=1e-4)
    full = replace(mixed, train=replace(mixed.train, weights=torch.ones(512)))
    assert run(full, max_iterations=3).kept.loss > 2 * plain.kept.loss


def test_the_references_rate_by_epoch() -> None:
    # Dassl's ConstantWarmupScheduler around CosineAnnealingLR(6), as its trainer steps them after each epoch.
    expected = [1e-5] + [0.002 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(5)]
    assert [rate(epoch, 6) for epoch in range(6)] == pytest.approx(expected)
    assert rate(1, 6) == 0.002


def test_the_references_steps_are_sgd_on_shuffled_batches(task: Task) -> None:
    """One epoch in plain arithmetic, from the same gradients."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(4 + reference.SHUFFLE_SEED))
    context, momentum = task.starts[0].clone(), torch.zeros_like(task.starts[0])
    one_view = CachedViews(task.train.features[:, :1], task.train.labels, task.train.weights)
    for rows in torch.split(order, 32):
        text_CD, pullback = task.bank.features_and_pullback(context)
        scores = score(text_CD, one_view.select(rows), SCALE, with_gradient=True)
        assert scores.gradient is not None
        momentum = 0.9 * momentum + pullback(scores.gradient) + 5e-4 * context
        context = context - 1e-5 * momentum
    learned = run(replace(task, train=one_view), "reference", seed=4)
    torch.testing.assert_close(learned.context, context, rtol=1e-5, atol=1e-8)
    assert not torch.equal(learned.context, task.starts[0])


def test_an_incomplete_batch_is_dropped_and_a_small_set_is_not(task: Task) -> None:
    def steps(images: int) -> int:
        part = replace(task, train=task.train.select(torch.arange(images)))
        learned = run(part, "reference")
        assert len(learned.history) == step_limit(part, Learn(schedule="reference"), 0)
        return len(learned.history)

    assert (steps(70), steps(64), steps(5)) == (3 * 2, 3 * 2, 3)
    assert step_limit(task, Learn(max_iterations=7), 0) == 7 + 7
    assert step_limit(task, Learn(max_iterations=30), 0) == 30 + 10


def test_the_best_of_the_starts_goes_on(task: Task) -> None:
    alone = [learn(replace(task, starts=start[None]), Learn(), 0, lambda _: None) for start in task.starts]
    steps: list[object] = []
    raced = learn(task, Learn(), 0, steps.append)
    assert any(torch.equal(raced.context, each.context) for each in alone)
    after_race = [each.history[:11] for each in alone]
    least = [min(step.loss_to_judge_by for step in history) for history in after_race]
    assert torch.equal(raced.context, alone[least.index(min(least))].context)
    assert raced.history[-1].passes > alone[least.index(min(least))].history[-1].passes, "the losers' passes count"
    assert len(steps) <= step_limit(task, Learn(), 0) + len(task.starts)


@pytest.mark.parametrize("schedule", ["fast", "reference"])
def test_contexts_of_each_category_fit_the_crops_at_least_as_well_as_a_shared_one(
    clip: ClipModel, schedule: str
) -> None:
    own = replace(make_task(clip, class_specific=True), holdout=None)
    shared = replace(own, starts=own.starts[:, 0])
    learned, of_all = run(own, schedule, max_iterations=30), run(shared, schedule, max_iterations=30)
    assert learned.context.shape == (len(own.bank), *of_all.context.shape)
    assert learned.history[0].loss == pytest.approx(of_all.history[0].loss, rel=1e-5), "they start from the same"
    found, found_shared = (
        score(own.bank.features(each.context), own.train, SCALE).loss for each in (learned, of_all)
    )  # fmt: skip
    assert found < (0.8 if schedule == "fast" else 1) * found_shared
    assert not torch.equal(learned.context[0], learned.context[1])


@pytest.mark.parametrize("class_specific", [False, True])
def test_several_layouts_are_learned_together(clip: ClipModel, class_specific: bool) -> None:
    task = make_task(clip, layouts=[DEFAULT_LAYOUT, OTHER_LAYOUTS[1]], class_specific=class_specific)
    learned = run(task, max_iterations=20)
    assert learned.kept.loss < 0.6 * learned.history[0].loss
    found = score(task.bank.features(learned.context), task.train, SCALE)
    assert found.loss == pytest.approx(learned.kept.loss, rel=1e-5)


def test_balance_gives_categories_the_same_weight_or_leaves_images_theirs() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    views = CachedViews(torch.zeros(4, 1, 2), labels, torch.tensor([1.0, 1.0, 2.0, 1.0]))
    even = views.balanced(1.0).weights
    assert float(even[:3].sum()) == pytest.approx(float(even[3]))
    assert float(even[2]) == pytest.approx(2 * float(even[0]))
    assert float(even.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(views.balanced(0.0).weights, views.weights / views.weights.mean())


@given(
    st.lists(st.integers(0, 5), max_size=200), st.floats(0, 0.9), st.integers(0, 5)
)  # fmt: skip
def test_held_out_images_are_the_share_of_every_category(labels: list[int], share: float, seed: int) -> None:
    labels_N = np.array(labels, dtype=np.int64)
    held = hold_out(labels_N, share, seed)
    assert abs(int(held.sum()) - share * len(labels)) <= 1
    for label in set(labels):
        here = labels_N == label
        assert abs(int(held[here].sum()) - share * int(here.sum())) <= 1 + 1e-9
    assert np.array_equal(held, hold_out(labels_N, share, seed))
