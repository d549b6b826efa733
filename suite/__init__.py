"""What is measured: the final norm, its dead directions, the spectra, and the checkpoints they are read from.

Nothing in this package imports `runners` or `analysis`.
"""
