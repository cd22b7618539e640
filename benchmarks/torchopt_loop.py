"""The sine problem's meta-step with TorchOpt: a Python loop over tasks, each with a differentiable `torchopt.MetaSGD`.

TorchOpt is no dependency of this project. `meta_step` adds these rows where torch, higher and torchopt can be imported.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchopt

from benchmarks.sine import INNER_LR, META_LR, Case, Outcome
from benchmarks.torch_loops import draw_tasks, flat, linear, make_learned_loss, make_optimizee


def _one_task(optimizee: torch.nn.Module, learned: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> Any:
    """The task loss after the inner steps, differentiable with respect to the learned loss. The optimizee keeps its start."""
    start = torchopt.extract_state_dict(optimizee, by="reference")
    inner = torchopt.MetaSGD(optimizee, lr=INNER_LR)
    for _ in range(steps):
        inner.step(learned(torch.cat((optimizee(x), y), dim=1)).mean())
    loss = torch.nn.functional.mse_loss(optimizee(x), y)
    torchopt.recover_state_dict(optimizee, start)
    return loss


def loop(num_tasks: int, inner_steps: int) -> Callable[[], Any]:
    """One meta-step."""
    optimizee, learned = make_optimizee(), make_learned_loss()
    meta = torch.optim.Adam(learned.parameters(), lr=META_LR)

    def step() -> None:
        meta.zero_grad()
        for _ in range(num_tasks):
            (x,), (y,) = draw_tasks(1)
            for layer in linear(optimizee):
                layer.reset_parameters()
            (_one_task(optimizee, learned, x, y, inner_steps) / num_tasks).backward()
        meta.step()

    return step


def outcome(case: Case, inner_steps: int) -> Outcome:
    """The loop on given weights and data."""
    optimizee, learned = make_optimizee(), make_learned_loss()
    with torch.no_grad():
        for layer, kernel in zip(linear(learned), case.loss_kernels, strict=True):
            layer.weight.copy_(torch.tensor(kernel.T))
    total = 0.0
    for index in range(len(case.x)):
        with torch.no_grad():
            for layer, (kernel, bias) in zip(linear(optimizee), case.layers, strict=True):
                layer.weight.copy_(torch.tensor(kernel[index].T))
                layer.bias.copy_(torch.tensor(bias[index]))
        x, y = torch.tensor(case.x[index]), torch.tensor(case.y[index])
        loss = _one_task(optimizee, learned, x, y, inner_steps) / len(case.x)
        loss.backward()
        total += loss.item()
    return Outcome(total, flat({str(i): layer.weight.grad for i, layer in enumerate(linear(learned))}))
