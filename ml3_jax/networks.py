"""Small networks shared by learned losses, optimizees and dynamics models; flax modules without state."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": nn.elu,
    "gelu": nn.gelu,
    "identity": lambda x: x,
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "softplus": nn.softplus,
    "tanh": nn.tanh,
}


def activation_fn(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of a name.

    Raises:
      ValueError: the name is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]


def fan_in_uniform(fan_in: int | None = None) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in), the initialiser of weights and biases in PyTorch's Linear and Conv.

    Args:
      fan_in: inputs to a unit; None: the product of all axes but the last of a kernel [..., in, out].
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32, out_sharding: object = None) -> jax.Array:
        del out_sharding
        inputs = fan_in if fan_in is not None else math.prod(shape[:-1])
        bound = inputs**-0.5
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init


class MLP(nn.Module):
    """A multi-layer perceptron [..., F] -> [..., widths[-1]], linear in its last layer.

    Attributes:
      widths: units of each layer, the output last.
      activation: name of the activation between layers.
      bias: whether layers have biases.
      init_scheme: "xavier" (Glorot uniform, zero biases), "lecun" (LeCun normal, zero biases), or "fan_in" (weights and
        biases uniform in +-1/sqrt(fan_in), as PyTorch draws them).
      last_scale: factor on the initial weights of the last layer.
    """

    widths: Sequence[int]
    activation: str = "relu"
    bias: bool = True
    init_scheme: str = "fan_in"
    last_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        activation, batch = activation_fn(self.activation), x.shape[:-1]
        # A single batch axis: XLA's CPU compiler (jaxlib 0.10.2) fuses the sum over tasks of two products over several axes,
        # as meta-gradients of trajectories [B, T, F] have them, into a kernel that reads memory before it is set.
        x = x.reshape(-1, x.shape[-1]) if len(batch) > 1 else x
        for index, width in enumerate(self.widths):
            last = index == len(self.widths) - 1
            fan_in = x.shape[-1]
            kernel_init, bias_init = _initializers(self.init_scheme, fan_in)
            if last and self.last_scale != 1.0:
                kernel_init = _scaled(kernel_init, self.last_scale)
            x = nn.Dense(width, use_bias=self.bias, kernel_init=kernel_init, bias_init=bias_init)(x)
            if not last:
                x = activation(x)
        return x.reshape(*batch, x.shape[-1]) if len(batch) > 1 else x


def _initializers(scheme: str, fan_in: int) -> tuple[nn.initializers.Initializer, nn.initializers.Initializer]:
    if scheme == "xavier":
        return nn.initializers.xavier_uniform(), nn.initializers.zeros
    if scheme == "lecun":
        return nn.initializers.lecun_normal(), nn.initializers.zeros
    if scheme == "fan_in":
        return fan_in_uniform(), fan_in_uniform(fan_in)
    raise ValueError(f"init_scheme: expected 'xavier', 'lecun' or 'fan_in', got {scheme!r}")


def _scaled(init: nn.initializers.Initializer, scale: float) -> nn.initializers.Initializer:
    def scaled(key: jax.Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> jax.Array:
        return scale * init(key, tuple(shape), *args, **kwargs)

    return scaled


class CNN(nn.Module):
    """A small convolutional classifier of flat square images [..., side * side] -> [..., classes].

    A convolution is written as patches times a matrix. Under vmap over optimizees with different kernels, this is one batched
    matrix product. `lax.conv` would become a grouped convolution, hundreds of times slower on a CPU.

    Attributes:
      side: pixels along an edge.
      channels: channels of each 3 x 3 convolution of stride 2, ReLU after each.
      classes: outputs, linear.
    """

    side: int
    channels: Sequence[int] = (8, 16)
    classes: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch = x.shape[:-1]
        x = x.reshape(-1, self.side, self.side, 1)
        for channels in self.channels:
            patches = _patches(x)
            fan_in = patches.shape[-1]
            dense = nn.Dense(channels, kernel_init=fan_in_uniform(), bias_init=fan_in_uniform(fan_in))
            x = nn.relu(dense(patches))
        x = x.reshape(*batch, -1)
        return nn.Dense(self.classes, kernel_init=fan_in_uniform(), bias_init=fan_in_uniform(x.shape[-1]))(x)


def _patches(x: jax.Array, size: int = 3, stride: int = 2) -> jax.Array:
    """The inputs of each unit of a convolution, zero-padded at the edge: [B, H, W, C] -> [B, H', W', size * size * C]."""
    height, width = x.shape[1:3]
    low = size // 2
    x = jnp.pad(x, ((0, 0), (low, low), (low, low), (0, 0)))
    shifted = [
        x[:, row : row + height : stride, column : column + width : stride] for row in range(size) for column in range(size)
    ]
    return jnp.concatenate(shifted, axis=-1)
