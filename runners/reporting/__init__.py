"""What a person, a log and Prometheus see of a run."""
