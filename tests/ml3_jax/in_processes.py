"""One of several processes of a program, which `test_processes` starts.

    python -m tests.ml3_jax.in_processes NUMBER COUNT PORT FOLDER

The first process writes the numbers of `across_processes` to FOLDER/COUNT.npz.
"""

import pathlib
import sys

import jax


def main() -> None:
    """Joins the other processes before anything starts a backend."""
    number, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)

    from tests.ml3_jax import across_processes

    across_processes.main(number, count, folder)


if __name__ == "__main__":
    main()
