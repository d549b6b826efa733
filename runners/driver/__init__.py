"""A run from joining Ray to giving everything back."""
