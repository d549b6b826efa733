"""models.yaml, validated: which models, suites and protocols there are."""
