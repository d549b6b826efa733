"""Whether a module normalises at all, in whatever way: what is asked of every module that a forward pass calls.

A pass calls hundreds, of sound and of pictures with many positions each, so most are to be passed by for little.
"""

import inspect

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.kernel_test import bare_copy, close, own_vectors, size
from deadbench.suite.tracing.flow import Passed

# What torch itself defines as linear; a class made of one may do anything with what it is given.
_LINEAR = {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
           nn.ConvTranspose3d}  # fmt: skip
_FEW = 64  # positions, of all axes together; more of them do not make a norm of what is none


def may_be_a_norm(module: nn.Module) -> bool:
    """Whether it is worth a probe: it holds no other modules, or vectors of its own beside them, and is no linear map.

    A linear map may be a head of a hundred thousand words, whose copy in float64 is a gigabyte.
    """
    if type(module) in _LINEAR:
        return False
    return bool(own_vectors(module)) or not any(True for _ in module.children())


def is_norm_of_maps(module: nn.Module) -> bool:
    """Whether it normalises over batches or groups of channels, as every convolution of a block may have it."""
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def normalises(module: nn.Module, given: Tensor | Passed | None) -> bool:
    """Whether `module` is a normalisation of any kind: of batches, or its output stays when all its input doubles.

    `given` is an input of the module, of which only the shape counts. What takes fewer positions of it, and does not
    normalise those, is asked no further.
    """
    if is_norm_of_maps(module):
        return True
    if type(module) in _LINEAR or given is None or not given.is_floating_point() or not _takes_one(module):
        return False
    try:
        bare = bare_copy(module)
    except Exception:  # whatever a stranger's code raises
        return False
    if any(_keeps(bare, few) is False for few in _few_positions(given.shape)):
        return False
    return bool(_keeps(bare, given.shape))


def _takes_one(module: nn.Module) -> bool:
    """Whether a module can be called with one tensor alone."""
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    except ValueError:  # a forward pass that is not Python's has no signature
        return True
    return True


def _few_positions(shape: torch.Size) -> list[torch.Size]:
    """The first positions behind their channels, (B, D, T) and (B, D, H, W), and ahead of them, (B, N, D)."""
    few = round(_FEW ** (1 / max(1, len(shape) - 2)))  # on each axis
    behind = (*shape[:2], *(min(length, few) for length in shape[2:]))
    ahead = (*shape[:1], *(min(length, few) for length in shape[1:-1]), *shape[1:][-1:])
    return [torch.Size(each) for each in dict.fromkeys((behind, ahead)) if each != shape]


def _keeps(bare: nn.Module, shape: torch.Size) -> bool | None:
    """Whether its output stays when an input of this shape doubles; None where it takes none, or tells nothing."""
    x = 1.7 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.9
    try:
        with torch.no_grad():
            outputs = [bare(x), bare(2 * x)]
    except Exception:  # whatever a stranger's code raises
        return None
    once, twice = (y[0] if isinstance(y, tuple) and y else y for y in outputs)
    if not isinstance(once, Tensor) or not once.is_floating_point():
        return None
    if size(once - once.mean()) == 0:  # of one number left of many nothing is told; a weight of zeros leaves all
        return False if once.shape == shape else None
    return close(once, twice)
