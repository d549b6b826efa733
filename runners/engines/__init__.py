"""How a model is loaded and run; one file an engine."""
