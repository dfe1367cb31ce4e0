"""The engine process: core, loop and executor."""
