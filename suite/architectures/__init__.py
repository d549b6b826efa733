"""The final norm, the blocks and the wiring of an architecture, found by behaviour."""
