"""Spectra of centred covariances, and what the scales alone say of them."""
