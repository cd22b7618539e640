"""What every entry point needs of the machine: devices, threads, files and the compilation cache."""
