"""A model in training, read in its own process: measure, callbacks, and all left as it was found."""
