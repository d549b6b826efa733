"""Which plots the report has, in order, with their captions."""

from collections.abc import Callable

import polars as pl

from deadbench.analysis.leaderboard import FAMILIES
from deadbench.analysis.lines import ok_reads
from deadbench.analysis.plots.axes import Spec
from deadbench.analysis.plots.models import MAX_MODELS, depth_plot, predicted_plot, size_plot, slope_plot
from deadbench.analysis.plots.movement import movement_plot
from deadbench.analysis.plots.norms import norms_plot
from deadbench.analysis.plots.positions import QUANTITIES, positions_plot
from deadbench.analysis.plots.spectra import MAX_SPECTRA, block_plot, spectra_plot
from deadbench.analysis.plots.training import training_plot, turning_plot
from deadbench.analysis.results import collected

LEARNED = "learned directions"  # of zero scales: as deep as a scale is small

Panel = tuple[str, Spec]  # the family that it is of, `LEARNED` or nothing, and the specification
Plot = tuple[str, str, list[Panel]]  # title, caption


def report_plots(
    reads: pl.LazyFrame, blocks: pl.LazyFrame, spectra: pl.LazyFrame, norms: pl.LazyFrame, functional: pl.LazyFrame
) -> list[Plot]:
    """The plots that have something to show; depths have a panel a family, each with an axis of its own."""
    found = collected(ok_reads(reads).select(pl.col("family").unique()))["family"].to_list()
    present = [family for family in FAMILIES if family in found]

    def by_family(plot: Callable[[str], Spec | None]) -> list[tuple[str, Spec | None]]:
        return [(family, plot(family)) for family in present]

    plots = [
        (
            "Spectra of the final norm",
            "Eigenvalues of the output's covariance, the largest left, the bottom one right; a diamond is the variance "
            "along v. A LayerNorm's curve falls into its kernel at the last place. The amber band is where float32 "
            "rounding is expected to fill a LayerNorm's kernel, by the closed form; in the grey one no accumulator "
            "certifies an eigenvalue. Hover for values, click a name to single it out, a point for the model's row. "
            f"({MAX_SPECTRA} models at most, the deepest of each family.)",
            [("", spectra_plot(reads, spectra))],
        ),
        (
            "Residual stream, block to block",
            "The smallest singular value over the median one at each tap; dotted, the rounding floor. A red cross is a "
            "block that collapsed a direction. Few distinct inputs limit the rank at the embedding: no dead direction.",
            [("", block_plot(reads, blocks))],
        ),
        (
            "Depth",
            "Each model at random initialisation (circle) and after training (diamond), an axis a family. A bar is the "
            f"standard error, or the spread over seeds. (The {MAX_MODELS} deepest at most.)",
            [*by_family(lambda family: depth_plot(reads, family)), (LEARNED, depth_plot(reads, learned=True))],
        ),
        (
            "Predicted against measured depth",
            "Every random and trained read of a LayerNorm without zero scales: what its scales alone predict, and what "
            "was measured. On the dashed line both are equal.",
            [("", predicted_plot(reads))],
        ),
        (
            "Depth against size",
            "One point a model, coloured by what its norm does.",
            by_family(lambda family: size_plot(reads, family)),
        ),
        (
            "From random to trained",
            "The models that were read both ways.",
            by_family(lambda family: slope_plot(reads, family)),
        ),
        (
            "Depth over training",
            "Every checkpoint of the models that have several; seeds as their mean, with the spread as a bar.",
            by_family(lambda family: training_plot(reads, "depth", family)),
        ),
        (
            "Variance along v over training",
            "The same checkpoints: lambda_v.",
            by_family(lambda family: training_plot(reads, "lambda_v", family)),
        ),
        (
            "Turning of v over training",
            "Degrees between v at each checkpoint and at the first, from the parameters alone.",
            [("", turning_plot(reads, norms))],
        ),
        (
            "Norms over the blocks",
            "The smallest scale of each norm over its median one, at the last checkpoint: yellow, all are alike; dark, "
            "one is near zero; a cross, it is zero for all purposes.",
            [("", norms_plot(reads, norms))],
        ),
        (
            "Moved along a dead direction",
            "How far the outputs move when the weights move by e: KL divergence, or the squared change of the last "
            "hidden state where there are no logits; the median over the maps, shaded their middle half. Dashed, "
            "the powers e^(2k): a regular direction follows k = 1, a dead hidden unit k = 2, a gauge is rounding.",
            by_family(lambda family: movement_plot(reads, functional, family)),
        ),
        (
            "First positions left out",
            "Models that were read both ways: with all positions, and by a protocol with skip_positions. Attention "
            "sinks and massive activations sit at the first ones.",
            [
                *by_family(lambda family: positions_plot(reads, blocks, "depth", family)),
                *((told, positions_plot(reads, blocks, name)) for name, told in QUANTITIES.items() if name != "depth"),
            ],
        ),
    ]
    told = [(title, caption, [(name, spec) for name, spec in panels if spec]) for title, caption, panels in plots]
    return [(title, caption, panels) for title, caption, panels in told if panels]
