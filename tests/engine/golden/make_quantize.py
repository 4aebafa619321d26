"""Makes quantize.json, what vector-quantize-pytorch computes on small inputs:

    pip install vector-quantize-pytorch==1.32.0
    python tests/engine/golden/make_quantize.py

`run` builds and calls whatever classes it is given: here upstream's, in the test ours.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DIM, CODES, LEVELS = 6, 8, 4


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in [-1, 1] that need no generator of random ones."""
    return torch.sin(torch.arange(math.prod(shape)) * 0.7 + phase).view(shape)


def filled(module: nn.Module) -> nn.Module:
    """The module with a state of which no two tensors have the same, finer from level to level."""
    state = module.state_dict()
    for number, key in enumerate(sorted(state)):
        level = int(key.split("layers.")[1].split(".")[0]) if "layers." in key else 0
        shape = state[key].shape
        if key.endswith("embed"):
            state[key] = wave(*shape, phase=number * 0.3) * 0.6**level
            # Of the state of an average, codes are the sums by the sizes.
            size = 2 + wave(1, shape[1], phase=number)
            state[key.replace("embed", "cluster_size")] = size
            state[key.replace("embed", "embed_avg")] = state[key] * size[..., None]
        elif not key.endswith(("embed_avg", "cluster_size", "initted")):
            state[key] = wave(*shape, phase=number + 1.0)
    module.load_state_dict(state)
    return module


def run(classes: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """{case: {"keys": the state dict's names and shapes, "outputs": numbers}}."""
    made: dict[str, dict[str, Any]] = {}

    def record(case: str, module: nn.Module, *outputs: Any) -> None:
        keys = {name: list(value.shape) for name, value in module.state_dict().items()}
        numbers = [[round(float(x), 6) for x in output.detach().flatten()] for output in outputs]
        made[case] = {"keys": keys, "outputs": numbers}

    def train(case: str, module: nn.Module, *shape: int, steps: int = 1, **arguments: Any) -> None:
        """What steps of training give: outputs, the input's gradient, and all state."""
        outputs: list[Tensor] = []
        for step in range(steps):
            x = wave(*shape, phase=2.0 + step).requires_grad_()
            quantized, codes, losses, *others = module(x, **arguments)
            weights = torch.arange(1, losses.numel() + 1).view(losses.shape)
            ((quantized * wave(*shape, phase=4.0)).sum() + (losses * weights).sum()).backward()
            outputs += [quantized, codes, losses, *others, x.grad]
        state = module.state_dict()  # codebooks are embed_avg by a smoothed cluster_size
        moved = (state[key] for key in sorted(state) if not key.endswith("embed_avg"))
        record(case, module, *outputs, *moved)

    x = wave(2, 5, DIM, phase=1.0)
    mask = torch.tensor([[True, True, False, True, True], [True, False, False, False, True]])

    for name, options in (("rotation", {}), ("straight through", {"rotation_trick": False})):
        train(f"one, {name}", filled(classes.VectorQuantize(DIM, CODES, **options)), *x.shape)
        module = classes.ResidualVQ(
            dim=DIM, num_quantizers=LEVELS, codebook_size=CODES, decay=0.9, **options
        )
        train(f"residual, {name}", filled(module), *x.shape, steps=2)
    module = filled(classes.VectorQuantize(DIM, CODES, codebook_dim=3, decay=0.7, eps=1e-3))
    train("one, projected", module, *x.shape)
    module = filled(classes.VectorQuantize(DIM, CODES)).eval()
    quantized, codes, loss = module(x)
    decoded = module.get_output_from_indices(codes)
    record("one, evaluation", module, quantized, codes, loss, decoded, *module(x[0])[:2])
    train("one, frozen", module.train(), *x.shape, freeze_codebook=True)
    wanted = torch.tensor([[0, 1, -1, 3, 4], [5, 6, 7, 0, -1]])
    record("one, cross-entropy", module, *module.eval()(x, indices=wanted))
    train("one, masked", filled(classes.VectorQuantize(DIM, CODES)), *x.shape, mask=mask)
    module = classes.VectorQuantize(DIM, CODES, return_zeros_for_masked_padding=False)
    train("one, by lengths", filled(module), *x.shape, lens=torch.tensor([3, 5]))
    module = filled(classes.VectorQuantize(DIM, CODES, channel_last=False))
    train("one, channels first", module, 2, DIM, 5)
    record("one, decoded channels first", module, module.get_output_from_indices(codes))
    module = filled(classes.VectorQuantize(DIM, CODES, accept_image_fmap=True))
    train("one, images", module, 2, DIM, 3, 2)
    module = filled(classes.VectorQuantize(DIM, CODES, accept_3d_fmap=True))
    train("one, volumes", module, 1, DIM, 3, 2, 2)

    sizes = {"num_quantizers": LEVELS, "codebook_size": CODES}
    module = filled(classes.ResidualVQ(dim=DIM, codebook_dim=4, commitment_weight=0.5, **sizes))
    train("residual, projected", module, *x.shape, return_all_codes=True)
    quantized, codes, losses = module.eval()(x)
    decoded = module.get_output_from_indices(codes)
    each = module.get_codes_from_indices(codes)
    record("residual, evaluation", module, quantized, codes, losses, decoded, each, *module(x[0]))
    train("residual, masked", filled(classes.ResidualVQ(dim=DIM, **sizes)), *x.shape, mask=mask)
    dropping = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1}
    for seed in (0, 1):
        module = filled(classes.ResidualVQ(dim=DIM, **dropping, **sizes))
        train(
            f"residual, dropped by seed {seed}",
            module,
            *x.shape,
            rand_quantize_dropout_fixed_seed=seed,
        )
    module = classes.ResidualVQ(dim=DIM, quantize_dropout_multiple_of=3, **dropping, **sizes)
    train(
        "residual, dropped by threes",
        filled(module),
        *x.shape,
        rand_quantize_dropout_fixed_seed=0,
    )
    module = filled(classes.GroupedResidualVQ(dim=2 * DIM, groups=2, decay=0.9, **sizes))
    train("grouped", module, 2, 5, 2 * DIM)
    quantized, codes, losses, each = module.eval()(wave(2, 5, 2 * DIM), return_all_codes=True)
    decoded = module.get_output_from_indices(codes)
    record("grouped, evaluation", module, quantized, codes, losses, *each, decoded)
    return made


if __name__ == "__main__":
    import vector_quantize_pytorch

    made = run(vector_quantize_pytorch)
    lines = (f"{json.dumps(case)}: {json.dumps(value)}" for case, value in made.items())
    Path(__file__).with_name("quantize.json").write_text("{" + ",\n".join(lines) + "}\n")
