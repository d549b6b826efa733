"""Bytes become named tensors, wherever a checkpoint lies; nothing in it is executed."""
