"""Plots of models, spectra and training, and their export as files."""
