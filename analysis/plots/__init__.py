"""Plots of models, spectra, training, norms, movement and comparisons, and their export as files."""
