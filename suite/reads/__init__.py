"""The reads: what one checkpoint or one forward pass comes to, as columns."""
