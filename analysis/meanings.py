"""What each column says, for those who point at its heading: the schema's words, and ours for what is computed."""

from deadbench.suite.schema import TABLES

COMPUTED = {
    "rank": "place by depth within one protocol and precision; only kernels have one",
    "kernel": "what the depth is of: algebraic (rounding alone fills it), learned (what training closed), or none",
    "depth_random": "depth at random initialisation, decades; the mean over its seeds ± their standard deviation",
    "deepening": "depth of the trained read less that at random initialisation, decades; replayed in float32",
    "deepening_as_executed": "the same of the outputs that the model computed, in the precision that it ran in (dtype)",
    "depth_spread": "standard deviation of the depth over seeds, decades",
    "num_seeds": "seeds at random initialisation",
    "num_replicates": "reads that the line is the mean of: seeds of the protocol, or of training",
    "holds": "whether every model that could be tested holds the claim",
    "statement": "the claim",
    "claim": "the claim",
    "num_models": "models that could be tested, or that there are",
    "num_hold": "of these, models all of whose reads hold the claim",
    "failing": "the models that do not hold it",
    "threshold": "what a read's value must satisfy",
    "value_median": "median over the models",
    "value_low": "lower end of the median's 95 % interval; from six models on",
    "value_high": "its upper end",
    "value_min": "smallest value of a read",
    "value_max": "largest value of a read",
    "value_margin": "how far the worst read is from the threshold; negative beyond it",
    "value_seed_spread": "standard deviation over seeds within a model, pooled over the models",
    "value_token_error": "standard error from the sample of tokens, pooled over the reads",
    "unit": "unit of the values",
    "expected": "what the registry says",
    "site": "the norm, or the block, that has the direction",
    "coordinates": "largest coordinates of the direction",
    "weights": "their squared weights",
    "at_random": "whether the model has it at random initialisation too",
    "opened_step": "first checkpoint that has it",
    "in_checkpoints": "checkpoints of the same run that have it",
    "num_checkpoints": "checkpoints of the run",
    "in_runs": "other runs of the architecture that have it",
    "num_runs": "other runs of the architecture",
    "dead_parameters_share_min": "smallest share of a model's parameters",
    "dead_parameters_share_median": "median share",
    "dead_parameters_share_max": "largest share",
}
_STORED = {
    column.name: f"{column.meaning}; {column.unit}" if column.unit else column.meaning
    for table in reversed(TABLES.values())  # of a name in several tables, the first one's words
    for column in table
}


def meaning(name: str) -> str:
    """A sentence on column `name`, empty where its name is all there is to say."""
    return COMPUTED.get(name) or _STORED.get(name, "")
