"""The sine problem's meta-step in PyTorch: the loop of the released code (`higher`), and `torch.func`.

It follows the description of the released code (Bechtle et al. 2020, arXiv:1906.05374): a Python loop over tasks, each with
its own `higher.innerloop_ctx`, adds the gradients of the task losses. The released code takes one inner step; more steps are
unrolled in the same context. Needs the extra `bench`; without it `meta_step` leaves these rows out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import higher
import numpy as np
import torch
from torch.func import functional_call, grad, grad_and_value, vmap

from benchmarks.sine import AMPLITUDES, HIDDEN, INNER_LR, META_LR, PHASES, SAMPLES, WIDTHS, X_RANGE, Case, Outcome

Tensors = dict[str, torch.Tensor]


def one_thread() -> None:
    """Runs PyTorch on one thread. More threads are slower at these sizes."""
    torch.set_num_threads(1)


def make_optimizee() -> torch.nn.Sequential:
    """ReLU between layers. PyTorch draws weights and biases uniformly from +-1/sqrt(fan_in)."""
    return _network((1, *WIDTHS), bias=True)


def make_learned_loss() -> torch.nn.Sequential:
    """ReLU between layers, softplus at the end, weights as Glorot draws them."""
    network = _network((2, *HIDDEN, 1), bias=False).append(torch.nn.Softplus())
    for layer in linear(network):
        torch.nn.init.xavier_uniform_(layer.weight)
    return network


def _network(widths: tuple[int, ...], bias: bool) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs, bias=bias), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def linear(network: torch.nn.Module) -> list[torch.nn.Linear]:
    """The layers with weights."""
    return [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]


def _uniform(bounds: tuple[float, float], *shape: int) -> torch.Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape)


def draw_tasks(num_tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [M, N, 1]."""
    x = _uniform(X_RANGE, num_tasks, SAMPLES, 1)
    return x, _uniform(AMPLITUDES, num_tasks, 1, 1) * torch.sin(x + _uniform(PHASES, num_tasks, 1, 1))


def _one_task_with_higher(
    optimizee: torch.nn.Module,
    inner: torch.optim.Optimizer,
    learned: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """The task loss after the inner steps, differentiable with respect to the learned loss."""
    with higher.innerloop_ctx(optimizee, inner, copy_initial_weights=False) as (fast, optimizer):
        for _ in range(steps):
            optimizer.step(learned(torch.cat((fast(x), y), dim=1)).mean())
        return torch.nn.functional.mse_loss(fast(x), y)


def released_loop(num_tasks: int, inner_steps: int) -> Callable[[], Any]:
    """One meta-step of the released code."""
    optimizee, learned = make_optimizee(), make_learned_loss()
    inner = torch.optim.SGD(optimizee.parameters(), lr=INNER_LR)
    meta = torch.optim.Adam(learned.parameters(), lr=META_LR)

    def step() -> None:
        meta.zero_grad()
        for _ in range(num_tasks):
            (x,), (y,) = draw_tasks(1)
            for layer in linear(optimizee):
                layer.reset_parameters()
            (_one_task_with_higher(optimizee, inner, learned, x, y, inner_steps) / num_tasks).backward()
        meta.step()

    return step


def released_outcome(case: Case, inner_steps: int) -> Outcome:
    """The released code's loop on given weights and data."""
    optimizee, learned = make_optimizee(), make_learned_loss()
    inner = torch.optim.SGD(optimizee.parameters(), lr=INNER_LR)
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
        loss = _one_task_with_higher(optimizee, inner, learned, x, y, inner_steps) / len(case.x)
        loss.backward()
        total += loss.item()
    return Outcome(total, flat({str(i): layer.weight.grad for i, layer in enumerate(linear(learned))}))


def _make_mean(optimizee: torch.nn.Module, learned: torch.nn.Module, inner_steps: int) -> Callable[..., torch.Tensor]:
    """mean(loss_params, params [M, ...], x, y): the mean over tasks of the task loss after the inner steps."""

    def inner_loss(params: Tensors, loss_params: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        features = torch.cat((functional_call(optimizee, params, (x,)), y), dim=1)
        return functional_call(learned, loss_params, (features,)).mean()

    def one_task(loss_params: Tensors, params: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(inner_steps):
            gradients = grad(inner_loss)(params, loss_params, x, y)
            params = {name: params[name] - INNER_LR * gradients[name] for name in params}
        return torch.nn.functional.mse_loss(functional_call(optimizee, params, (x,)), y)

    return lambda loss_params, params, x, y: vmap(one_task, (None, 0, 0, 0))(loss_params, params, x, y).mean()


def func_loop(num_tasks: int, inner_steps: int) -> Callable[[], Any]:
    """One meta-step with functional_call, vmap over tasks and grad, without compilation."""
    optimizee, learned = make_optimizee(), make_learned_loss()
    meta = torch.optim.Adam(learned.parameters(), lr=META_LR)
    meta_gradient = grad(_make_mean(optimizee, learned, inner_steps))
    bounds = {
        f"{name}.{kind}": layer.in_features**-0.5
        for name, layer in optimizee.named_modules()
        if isinstance(layer, torch.nn.Linear)
        for kind in ("weight", "bias")
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in optimizee.named_parameters()}

    def step() -> None:
        x, y = draw_tasks(num_tasks)
        params = {name: _uniform((-bounds[name], bounds[name]), num_tasks, *shape) for name, shape in shapes.items()}
        loss_params = {name: parameter.detach() for name, parameter in learned.named_parameters()}
        gradients = meta_gradient(loss_params, params, x, y)
        for name, parameter in learned.named_parameters():
            parameter.grad = gradients[name]
        meta.step()

    return step


def func_outcome(case: Case, inner_steps: int) -> Outcome:
    """The torch.func loop on given weights and data."""
    optimizee, learned = make_optimizee(), make_learned_loss()
    names = [name.removesuffix(".weight") for name, _ in optimizee.named_parameters() if name.endswith(".weight")]
    params: Tensors = {}
    for name, (kernel, bias) in zip(names, case.layers, strict=True):
        params |= {f"{name}.weight": torch.tensor(kernel.transpose(0, 2, 1)), f"{name}.bias": torch.tensor(bias)}
    loss_names = [name for name, _ in learned.named_parameters()]
    loss_params = {name: torch.tensor(kernel.T) for name, kernel in zip(loss_names, case.loss_kernels, strict=True)}
    mean = _make_mean(optimizee, learned, inner_steps)
    gradients, value = grad_and_value(mean)(loss_params, params, torch.tensor(case.x), torch.tensor(case.y))
    return Outcome(value.item(), flat(gradients))


def flat(gradients: dict[str, Any]) -> np.ndarray:
    """[P] gradients of the kernels, transposed to [in, out]."""
    return np.concatenate([np.ravel(gradient.numpy().T) for gradient in gradients.values()])
