"""The parameters-only read over thousands of checkpoints, on Ray Data."""
