"""Centre what a model writes to its residual stream: fewer parameters that mean anything, the same outputs.

    python examples/centre_weights.py ./my-checkpoint ./centred

Where only LayerNorms read the stream, a constant along the vector of ones is taken out by their mean, whatever wrote
it. So each embedding row, each column of an output map and each bias can lose its mean. (If everything that writes is
in the list, the stream's mean is then zero, and a LayerNorm of it is an RMSNorm.)

The means are taken in float64 and the result is stored in float32, whatever the checkpoint was: in float16 the rounding
of the moved weights would be a change of its own. The largest change of an output is measured and printed.
"""

import sys
from pathlib import Path

import torch
import transformers
from torch import nn

from deadbench.suite.architectures.build import published_class
from deadbench.suite.architectures.wiring import Wiring, is_linear, private_parameters, weight_out_in
from deadbench.suite.reads.dead_parameters import trace_published
from deadbench.suite.tracing.minimal_inputs import running_inputs


def centre_weights(model: nn.Module, wiring: Wiring) -> list[str]:
    """Take the mean over the stream's axis off every parameter whose shift along 1 only LayerNorms read, in place.

    Returns:
        Paths of what was centred. A matrix that is shared with another module stays as it is.
    """
    private = private_parameters(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    centred = []
    with torch.no_grad():
        for path in wiring.writes:
            module = modules.get(path)
            own = [parameters[path]] if module is None else list(module.parameters(recurse=False))
            if any(id(parameter) not in private for parameter in own):
                continue
            if module is None:
                parameters[path].sub_(parameters[path].mean(-1, keepdim=True))
            elif is_linear(module):
                weight_DI = weight_out_in(module)
                weight_DI.sub_(weight_DI.mean(0))
                if module.bias is not None:
                    module.bias.sub_(module.bias.mean())
            elif isinstance(module, nn.Embedding):
                module.weight.sub_(module.weight.mean(-1, keepdim=True))
            else:  # a norm that writes to the stream: its shift
                shift = getattr(module, wiring.norms[path][0].shift_parameter or "", None)
                if shift is None:
                    continue
                shift.sub_(shift.mean())
            centred.append(path)
    return centred


def outputs(model: nn.Module) -> torch.Tensor:
    """The logits, or the last hidden state, of a seeded random input, in float64."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        vocabulary = model.config.get_text_config().vocab_size
        inputs = {"input_ids": torch.randint(vocabulary, (2, 32), generator=generator)}
    else:
        inputs = running_inputs(model)
        pixels = inputs[model.main_input_name]
        inputs[model.main_input_name] = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def main() -> None:
    """Centre the checkpoint in one folder and save it in another."""
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/centre_weights.py CHECKPOINT_FOLDER OUT_FOLDER")
    source, out = sys.argv[1:]
    config = transformers.AutoConfig.from_pretrained(source)
    _, wiring = trace_published(config)
    if wiring is None:
        sys.exit(f"{source}: its forward pass cannot be followed; nothing written")
    model_class = published_class(config) or transformers.AutoModel
    model = model_class.from_pretrained(source, dtype=torch.float64)
    before = outputs(model)
    centred = centre_weights(model, wiring)
    model.float().save_pretrained(Path(out))
    after = outputs(model_class.from_pretrained(out, dtype=torch.float64))
    change = float((after - before).abs().max() / before.abs().max())
    print(f"{out}: centred {len(centred)} modules; the outputs changed by {change:.0e} of the largest")


if __name__ == "__main__":
    main()
