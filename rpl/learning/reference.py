"""PromptDet's own schedule (fcjian/RPL, on Dassl's trainer): SGD, an epoch per view. Kept as the yardstick."""

from __future__ import annotations

import math

import torch

from rpl.learning.journal import Journal
from rpl.learning.task import Learned, Meter, Objective, OnStep, Step, Task
from rpl.objective import CachedViews

WEIGHT_DECAY = 5e-4  # Dassl's default, which the reference leaves in place
BATCH = 32
LEARNING_RATE = 0.002
WARM_UP_RATE = 1e-5
MOMENTUM = 0.9
SHUFFLE_SEED = 1  # added to the run's, so that the order of images and the start are drawn apart


def learn_reference(task: Task, seed: int, on_step: OnStep, journal: Journal) -> Learned:
    """SGD with momentum from the first start, shuffled batches of 32, epoch e on view e, its rate from `rate`."""
    train, meter = task.train, Meter(task.bank.token_count)
    objective = Objective(task, meter, journal, "all")
    epochs = train.features.shape[1]
    context = task.starts[0].clone().requires_grad_()
    optimiser = torch.optim.SGD([context], lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed + SHUFFLE_SEED)
    history: list[Step] = []
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = rate(epoch, epochs)
        for rows_N in torch.split(torch.randperm(len(train), generator=generator), BATCH):
            if len(rows_N) < BATCH <= len(train):
                continue  # the reference drops an incomplete batch
            rows_N = rows_N.to(train.features.device)
            batch = CachedViews(train.features[rows_N, epoch : epoch + 1], train.labels[rows_N], train.weights[rows_N])
            found = objective(context.detach(), batch, f"step {len(history)}", hold_out=False)
            context.grad = found.gradient
            optimiser.step()
            history.append(Step(len(history) + 1, meter.passes, found.loss, found.accuracy))
            on_step(history[-1])
    return Learned(context.detach().clone(), history, history[-1])


def rate(epoch: int, epochs: int) -> float:
    """The reference's learning rate: a warm-up epoch, then a cosine that starts over from the full rate."""
    if epoch == 0:
        return WARM_UP_RATE
    return LEARNING_RATE * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def step_limit(task: Task) -> int:
    """The number of its steps."""
    return int(task.train.features.shape[1]) * max(1, len(task.train) // BATCH)
