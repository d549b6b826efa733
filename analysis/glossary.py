"""The words of tables, pages and messages, each in a sentence or two: for the shell, the report and the docs."""

TERMS = {
    "algebraic": "Of a dead direction: it follows from the formula of the norm, and rounding alone fills it (about "
    "13 decades in float32, 32 in float64). A LayerNorm has one, an RMSNorm none.",
    "alignment": "Cosine between v and the bottom eigenvector of the final norm's output; 1 where the direction "
    "that the scales tell is the one that is measured.",
    "broken": "Of a gate's check: the metric got worse by more than the gate bears; the opposite is passed.",
    "cannot tell": "Of a gate's check: the noise hides whether a change is borne; more tokens or seeds would tell.",
    "centred stream": "A residual stream without a mean over its coordinates, as after folding the mean into what "
    "writes to it: an RMSNorm of it computes what a LayerNorm does, and has the kernel gamma^-1 too.",
    "change step": "The first checkpoint after a step in a metric, where one step explains the series better than "
    "none.",
    "claim": "A statement about a normalisation family; a model holds it when all its reads that can test it do.",
    "collapsed": "A block of the residual stream after which a direction is dead, or far smaller, that was alive "
    "before it, in both halves of the tokens.",
    "containment": "How much of the dead subspace that the scales predict lies in the measured one; 1 is all.",
    "dead direction": "A direction along which the output of a norm, or the residual stream, does not vary: "
    "whatever reads along it makes no difference.",
    "dead params": "Directions of parameter space along which no output changes, whatever the input, counted from "
    "the parameters alone; a lower bound.",
    "deepening": "The depth after training minus the depth at random initialisation, in decades: of the norm "
    "replayed in float32, or, as executed, of the outputs in the precision that the model ran in.",
    "depth": "log10 of the mean eigenvalue over the variance along v, in decades: how dead the direction is. "
    "Compare depths of one protocol and precision only.",
    "exact": "Whether the variance along v falls with the square of the rounding from float32 to float64, as that "
    "of an algebraic kernel does.",
    "failed": "A read that could not be made; its row says why.",
    "flags": "What a reader of a row should know before comparing it, as words: zero-scales, rank-limited, "
    "random-input, tf32 and others.",
    "gauge": "Of a direction of parameter space: no step along it moves the outputs, but for rounding.",
    "learned": "Of a dead direction: training closed it, as a scale of zero does; it is as dead in float64 as in "
    "float32.",
    "lost": "In a comparison: the baseline has a value of the metric and the candidate has none.",
    "margin": "How far the worst read is from a claim's threshold; negative beyond it.",
    "massive coordinate": "A coordinate of the residual stream whose second moment is above 1000 times the median "
    "one; mostly the first positions of a sequence make it so.",
    "missing": "In a comparison: a read of the baseline that the candidate does not have.",
    "noise": "The standard deviation that a change would have from sampling alone; as a verdict: a change within two.",
    "opened": "The first checkpoint of a series that has a dead direction.",
    "order": "k in KL ~ step^(2k) along a direction of parameter space: 1 where it is regular, 2 or more where it "
    "is singular.",
    "preserved": "A block of the residual stream after which no direction died.",
    "preserved-dead": "A block after which the same directions are dead as before it: it closed none. Behind "
    "post-norm blocks every place carries that norm's own kernel.",
    "protocol": "How many tokens a read takes, in sequences of which length, and which taps; only reads of one "
    "protocol are compared.",
    "rank-limited": "Too few distinct inputs for the rank to mean anything at that place; no dead direction.",
    "read": "What is made of a checkpoint: parameters (the scales alone), random (a forward pass at random "
    "initialisation), trained (one with its weights), functional (weights moved along dead directions).",
    "regular": "Of a direction of parameter space: the outputs move in first order (k = 1), as along a random one.",
    "revived": "A block of the residual stream after which no direction is dead, though there was one before it.",
    "rounding": "Of a dead direction: too deep to tell whether it is algebraic or learned.",
    "schur ratio": "The share of the variance along v that the other directions explain; noise that has nothing to "
    "do with them gives the baseline (D - 1)/N.",
    "series": "The checkpoints of one training run, in the order of their steps.",
    "singular": "Of a direction of parameter space: the outputs move in second order or higher (k >= 1.9), as along "
    "the weights in and out of a dead hidden unit.",
    "undetermined": "The family, or the final norm, cannot be told for certain; nothing is guessed.",
    "unresolved": "Of a direction of parameter space: too few steps between rounding and saturation, or another "
    "order than those known.",
    "v": "The direction of the inverse scales, gamma^-1 / |gamma^-1|: the kernel of a LayerNorm's centred output.",
}
