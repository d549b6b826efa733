"""What an actor does: the reads of one model."""
