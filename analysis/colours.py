"""The one table of colours, of all plots and of the pages.

A family has a hue, cool for LayerNorm and warm for RMSNorm, and its models are tones of it: a colour says the same of a
norm everywhere. All are readable on white and on near black.
"""

TONES = {
    "layernorm": ("#3b82d6", "#159a8c", "#7a6ae0", "#2fa3d1", "#4f9a4d", "#5b7fb8"),
    "rmsnorm": ("#e07b39", "#cf4a45", "#b8892b", "#d0659a", "#a9704a", "#e2a13d"),
    "none": ("#8a949e", "#6d7883", "#a9b1b9"),
    "other": ("#9b6bd3", "#b48be0", "#8257b8"),
    "undetermined": ("#c05a7c", "#d8829f", "#a34766"),
}
FAMILY_COLOURS = {family: tones[0] for family, tones in TONES.items()}
STATE_COLOURS = {"preserved": "#2f9455", "collapsed": "#d64545", "revived": "#b8892b"}  # others: the line's own
DIRECTION_COLOURS = {
    "compensated": "#3b82d6", "uncompensated": "#7a6ae0", "inverse-scale-rms": "#cf4a45", "random": "#8a949e",
    "zero-scale": "#159a8c", "learned": "#b8892b", "planted-unit": "#e07b39", "planted-chain": "#d0659a",
}  # fmt: skip
VERDICT_COLOURS = {"same": "#8a949e", "noise": "#a9b1b9", "changed": "#e07b39", "lost": "#d64545"}
RULE, ROUNDING, FLOOR, CHANGE = "#8a949e", "#d9a520", "#8a949e", "#e07b39"
LINE_COLOURS = tuple(tone for pair in zip(TONES["layernorm"], TONES["rmsnorm"], strict=True) for tone in pair)
