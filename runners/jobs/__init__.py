"""Registry and flags become reads with keys."""
