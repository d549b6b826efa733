"""Whether a machine or a cluster can do the reads: a line for each small step of one."""
