"""What is measured: the norm, its dead directions, the spectra; imports neither of the other rooms."""
