"""The words of tables, pages and messages, each in a sentence or two: for the shell, the report and the docs."""

TERMS = {
    "algebraic": "Of a dead direction: it follows from the formula of the norm, and rounding alone fills it "
    "(about 13 decades in float32, 32 in float64). A LayerNorm has one, an RMSNorm none.",
    "alignment": "Cosine between v and the bottom eigenvector of the final norm's output; 1 where the direction "
    "that the scales tell is the one that is measured.",
    "broken": "Of a gate's check: the metric got worse by more than the gate bears; the opposite is passed.",
    "change step": "The first checkpoint after a step in a metric, where one step explains the series better "
    "than none.",
    "claim": "A statement about a normalisation family; a model holds it when all its reads that can test it do.",
    "collapsed": "A block of the residual stream after which a direction is dead, or far smaller, that was alive "
    "before it, in both halves of the tokens.",
    "containment": "How much of the dead subspace that the scales predict lies in the measured one; 1 is all.",
    "dead direction": "A direction along which the output of a norm, or the residual stream, does not vary: "
    "whatever reads along it makes no difference.",
    "dead params": "Directions of parameter space along which no output changes, whatever the input, counted "
    "from the parameters alone; a lower bound.",
    "deepening": "The depth after training minus the depth at random initialisation, in decades.",
    "depth": "log10 of the mean eigenvalue over the variance along v, in decades: how dead the direction is. "
    "Compare depths of one protocol and precision only.",
    "exact": "Whether the variance along v falls with the square of the rounding from float32 to float64, as "
    "that of an algebraic kernel does.",
    "failed": "A read that could not be made; its row says why.",
    "learned": "Of a dead direction: training closed it, as a scale of zero does; it is as dead in float64 as in "
    "float32.",
    "lost": "In a comparison: the baseline has a value of the metric and the candidate has none.",
    "margin": "How far the worst read is from a claim's threshold; negative beyond it.",
    "missing": "In a comparison: a read of the baseline that the candidate does not have.",
    "noise": "The standard deviation that a change would have from sampling alone; as a verdict: a change within two.",
    "opened": "The first checkpoint of a series that has a dead direction.",
    "preserved": "A block of the residual stream after which no direction died.",
    "preserved-dead": "A block after which the same directions are dead as before it: it closed none. Behind "
    "post-norm blocks every place carries that norm's own kernel.",
    "protocol": "How many tokens a read takes, in sequences of which length, and which taps; only reads of one "
    "protocol are compared.",
    "rank-limited": "Too few distinct inputs for the rank to mean anything at that place; no dead direction.",
    "read": "What is made of a checkpoint: parameters (the scales alone), random (a forward pass at random "
    "initialisation), trained (one with its weights), functional (weights moved along dead directions).",
    "revived": "A block of the residual stream after which no direction is dead, though there was one before it.",
    "rounding": "Of a dead direction: too deep to tell whether it is algebraic or learned.",
    "series": "The checkpoints of one training run, in the order of their steps.",
    "undetermined": "The family, or the final norm, cannot be told for certain; nothing is guessed.",
    "v": "The direction of the inverse scales, gamma^-1 / |gamma^-1|: the kernel of a LayerNorm's centred output.",
}
