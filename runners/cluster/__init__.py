"""The nodes of Ray: what starts where, in which processes, and what it died of."""
