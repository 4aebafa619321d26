"""Makes attention.json, what other people's attention classes compute on small inputs:

    pip install --no-deps --target PACKAGES \\
        audiolm-pytorch==2.4.0 musiclm-pytorch==0.2.8 timm==1.0.31 transformers==5.23.0
    python tests/engine/golden/make_attention.py PACKAGES

Only the classes themselves are taken out of those packages, which want much else to be imported.
`run` builds and calls whatever classes it is given: here upstream's, in the test ours.
"""

import __future__

import ast
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

DIM, HEADS, DIM_HEAD = 6, 2, 4
T5_CONFIG = SimpleNamespace(
    d_model=DIM,
    d_kv=DIM_HEAD,
    num_heads=HEADS,
    dropout_rate=0.1,
    is_decoder=False,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
    _attn_implementation="eager",
)


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in [-1, 1] that need no generator of random ones."""
    return torch.sin(torch.arange(math.prod(shape)) * 0.7 + phase).view(shape)


def filled(module: nn.Module) -> nn.Module:
    """The module in `eval()`, with weights of which no two parameters have the same."""
    for number, (_, parameter) in enumerate(sorted(module.named_parameters())):
        parameter.data.copy_(wave(*parameter.shape, phase=number + 1.0))
    return module.eval()


@torch.no_grad()
def run(classes: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """{case: {"keys": the state dict's names and shapes, "outputs": numbers}}."""
    made: dict[str, dict[str, Any]] = {}

    def record(case: str, module: nn.Module, *outputs: Tensor) -> None:
        keys = {name: list(value.shape) for name, value in module.state_dict().items()}
        numbers = [[round(x, 6) for x in output.flatten().tolist()] for output in outputs]
        made[case] = {"keys": keys, "outputs": numbers}

    x, context = wave(2, 4, DIM), wave(2, 3, 5, phase=2.0)
    own_mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    context_mask = torch.tensor([[True, False, True], [False, False, False]])
    bias = wave(HEADS, 4, 4, phase=3.0)

    module = filled(classes.RelativePositionBias(dim=4, heads=HEADS, layers=2))
    record("relative position", module, module(2, 4), module(3, 3))

    module = filled(classes.grid_network(4, HEADS))
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0))
    record("dynamic position", module, module(grid[:, None] - grid))

    make = classes.MultiQueryAttention
    module = filled(make(DIM, causal=True, dim_head=DIM_HEAD, heads=HEADS))
    first, (cache, values) = module(
        x, mask=own_mask, attn_bias=bias, return_kv_cache=True, return_values=True
    )
    x_next = wave(2, 2, DIM, phase=5.0)
    mask_next = F.pad(own_mask, (0, 2), value=True)
    bias_next = wave(HEADS, 2, 6, phase=6.0)
    second = module(x_next, mask=mask_next, attn_bias=bias_next, kv_cache=cache)
    record("self-attention with cache", module, first, cache, values, second)

    prefixed = module(
        x,
        mask=own_mask,
        attn_bias=bias,
        prefix_context=wave(2, 2, DIM, phase=7.0),
        prefix_context_mask=torch.tensor([[True, False], [True, True]]),
        value_residual=wave(2, 6, DIM_HEAD, phase=8.0),
    )
    unmasked = module(x, prefix_context=wave(2, 2, DIM, phase=7.0))
    record("self-attention with prefix", module, prefixed, unmasked)

    module = filled(make(DIM, False, DIM_HEAD, 5, HEADS, True, 2))
    output, values = module(x, context, context_mask, return_values=True)
    record("cross-attention", module, output, values)

    module = filled(classes.CosineAttention(DIM, False, DIM_HEAD, HEADS, 0.1, 6))
    per_row = wave(2, HEADS, 4, 4, phase=9.0)
    record("cosine", module, module(x), module(x, per_row, own_mask))
    module = filled(classes.CosineAttention(DIM, causal=True, dim_head=DIM_HEAD, heads=HEADS))
    record("causal cosine", module, module(x, rel_pos_bias=bias))

    windows = wave(4, 6, DIM, phase=10.0)
    module = filled(classes.WindowAttention(DIM, (2, 3), HEADS))
    regions = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 2, 2, 3]])
    mask = -100.0 * (regions[:, :, None] != regions[:, None, :])
    output = module(windows)
    module.logit_scale.data.fill_(5.0)  # past its limit, and so sharp that -100 hides little
    record("window", module, output, module(windows, mask))
    module = filled(
        classes.WindowAttention(
            DIM, (1, 6), HEADS, qkv_bias=False, pretrained_window_size=(4, 4), proj_drop=0.1
        )
    )
    record("window of another size", module, module(windows))

    module = filled(classes.T5Attention(T5_CONFIG, has_relative_attention_bias=True, layer_idx=0))
    padding = torch.where(own_mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    first, position_bias, _ = module(x, mask=padding)
    shared, _, _ = module(x + 1, position_bias=position_bias)
    record("t5 encoder", module, first, shared)
    decoder = SimpleNamespace(**(vars(T5_CONFIG) | {"is_decoder": True}))
    module = filled(classes.T5Attention(decoder, True, 0))
    later = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)[None, None]
    record("t5 decoder", module, module(x, mask=later)[0])
    module = filled(classes.T5Attention(decoder, layer_idx=0))
    record("t5 cross-attention", module, module(x, key_value_states=wave(2, 3, DIM))[0])

    buckets = [
        classes.t5_bucket(torch.arange(-far, far), bidirectional, num_buckets, max_distance)
        for bidirectional in (True, False)
        for far, num_buckets, max_distance in ((140, 32, 128), (25, 8, 20))
    ]
    made["t5 buckets"] = {"keys": {}, "outputs": [bucket.tolist() for bucket in buckets]}
    return made


def upstream(packages: Path) -> SimpleNamespace:
    """The classes of the installed packages, under our names."""
    tensors = {"torch": torch, "nn": nn, "F": F, "einsum": torch.einsum, "Tensor": Tensor}
    tensors |= {"rearrange": rearrange, "repeat": repeat, "math": math}

    names = ("exists", "Config", "Attend")
    audiolm = definitions(packages / "audiolm_pytorch/attend.py", tensors, *names)
    audiolm = definitions(
        packages / "audiolm_pytorch/audiolm_pytorch.py",
        audiolm,
        *("exists", "default", "LayerNorm", "RelativePositionBias", "Attention"),
    )
    musiclm_file = packages / "musiclm_pytorch/musiclm_pytorch.py"
    names = ("exists", "default", "l2norm", "LayerNorm", "Attention")
    musiclm = definitions(musiclm_file, tensors, *names)

    layers = packages / "timm/layers"
    timm = definitions(layers / "grid.py", tensors, "ndgrid")
    timm["to_2tuple"] = lambda size: size if isinstance(size, tuple) else (size, size)
    timm = definitions(packages / "timm/models/swin_transformer_v2.py", timm, "WindowAttention")

    transformers = tensors | {
        "ALL_ATTENTION_FUNCTIONS": SimpleNamespace(get_interface=lambda _, default: default),
        "EncoderDecoderCache": type("EncoderDecoderCache", (), {}),
    }
    transformers = definitions(
        packages / "transformers/models/t5/modeling_t5.py",
        transformers,
        *("eager_attention_forward", "T5Attention"),
    )

    def grid_network(dim: int, heads: int) -> nn.Module:
        scope = {"nn": nn, "Rearrange": Rearrange, "mlp_hidden_dim": dim, "heads": heads}
        return eval(assigned(musiclm_file, "dynamic_pos_bias_mlp"), scope)

    def t5_bucket(distance: Tensor, *sizes: int) -> Tensor:
        return transformers["T5Attention"]._relative_position_bucket(-distance, *sizes)

    return SimpleNamespace(
        RelativePositionBias=audiolm["RelativePositionBias"],
        MultiQueryAttention=audiolm["Attention"],
        CosineAttention=musiclm["Attention"],
        grid_network=grid_network,
        WindowAttention=timm["WindowAttention"],
        T5Attention=transformers["T5Attention"],
        t5_bucket=t5_bucket,
    )


def definitions(file: Path, scope: dict[str, Any], *names: str) -> dict[str, Any]:
    """The scope with what a file defines at its top under these names, and its typing names."""
    wanted = [
        node
        for node in ast.parse(file.read_text()).body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names)
        or (isinstance(node, ast.ImportFrom) and node.module in ("typing", "collections"))
    ]
    code = compile(
        ast.Module(body=wanted, type_ignores=[]),
        str(file),
        "exec",
        flags=__future__.annotations.compiler_flag,  # the types need not be there
    )
    defined = dict(scope)
    exec(code, defined)  # noqa: S102  the package was installed to be run
    assert all(name in defined for name in names), file
    return defined


def assigned(file: Path, attribute: str) -> Any:
    """The expression that a file assigns to self.attribute, compiled."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", None) == attribute:
            return compile(ast.Expression(node.value), str(file), "eval")
    raise ValueError(f"{file} assigns no self.{attribute}")


if __name__ == "__main__":
    made = run(upstream(Path(sys.argv[1])))
    lines = (f"{json.dumps(case)}: {json.dumps(value)}" for case, value in made.items())
    Path(__file__).with_name("attention.json").write_text("{" + ",\n".join(lines) + "}\n")
