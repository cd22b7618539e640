"""The machine: devices, threads, files and the compilation cache."""
