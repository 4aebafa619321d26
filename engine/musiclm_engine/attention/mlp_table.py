"""The outputs of a small network for all offsets at once."""

import torch
from torch import Tensor, nn
from torch.func import functional_call


def mlp_outputs(mlp: nn.Module, offsets: Tensor) -> Tensor:
    """mlp(offsets) in float32, or float64 for a float64 module, whatever autocast says.

    Half precision has no room for offsets: bfloat16 counts to 256, and then in twos.
    """
    parameters = dict(mlp.named_parameters())
    wide = torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)
    widened = {name: parameter.to(wide) for name, parameter in parameters.items()}
    with torch.autocast(offsets.device.type, enabled=False):
        return functional_call(mlp, widened, (offsets.to(wide),))
