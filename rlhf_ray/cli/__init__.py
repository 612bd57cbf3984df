"""The command line ``rlhf-ray``: one module for each command, and nothing heavy imported."""
