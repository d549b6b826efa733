"""One file a format of checkpoints: what their headers tell, in the same form for each."""
