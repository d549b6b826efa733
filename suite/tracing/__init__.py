"""What flows where in a model, found by running it on the meta device."""
