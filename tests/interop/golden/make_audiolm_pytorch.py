"""Makes audiolm_pytorch.json, the logits of audiolm-pytorch's transformers on a few tokens:

    pip install --no-deps --target UNMIXED audiolm-pytorch==2.4.0 hyper-connections==0.3.8
    pip install --no-deps --target MIXED audiolm-pytorch==2.4.0 hyper-connections==0.4.9
    python tests/interop/golden/make_audiolm_pytorch.py UNMIXED unmixed
    python tests/interop/golden/make_audiolm_pytorch.py MIXED mixed

in the repository's root, whose engine/ and kernels/ are on the path. Weights are made of their
names and shapes alone, so the file holds none. The test makes the same, and `logits` of upstream's
package once more where it is installed.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).with_name("audiolm_pytorch.json")
DIM, DEPTH, HEADS, TEXT_DIM = 32, 3, 4, 16
SEMANTIC, CODEBOOK, COARSE, FINE = 20, 12, 2, 3
KINDS = ("semantic", "coarse", "fine")
CONDITIONS = ("without", "text", "null")  # null: with text that nothing attends to


def wave(*shape: int, phase: float) -> Tensor:
    """Numbers in [-1, 1] that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (2 * torch.frac(1e4 * torch.sin(12.9898 * n + phase).abs()) - 1).view(shape).float()


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Of a state dict's names and shapes: no two alike, of sizes that keep activations near 1."""
    made = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        value = wave(*shape, phase=float(number))
        if name.endswith("beta"):
            value = torch.zeros(shape)  # a buffer
        elif name.endswith(("branch.norm.gamma", "context_norm.gamma", "static_beta")):
            value = 1 + 0.3 * value
        elif name.endswith("_scale"):
            value = 0.2 + 0.1 * value
        elif name.endswith("weight"):
            value = value * (3 / shape[-1]) ** 0.5
        made[name] = value
    return made


def inputs() -> dict[str, Tensor]:
    """Tokens of two rows, and text of which the second row's is shorter."""
    semantic = torch.arange(14).view(2, 7) * 3 % SEMANTIC
    coarse = torch.arange(16).view(2, 8) * 5 % CODEBOOK
    fine = torch.arange(20).view(2, 10) * 7 % CODEBOOK
    text = wave(2, 5, TEXT_DIM, phase=0.5)
    text[1, 3:] = 0.0
    return {"semantic": semantic, "coarse": coarse, "fine": fine, "text": text}


def build(package: ModuleType, kind: str, condition: str, **options: Any) -> nn.Module:
    """Upstream's transformer with `weights`."""
    if condition != "without":
        options |= {"has_condition": True, "cond_dim": TEXT_DIM}
    options |= {"dim": DIM, "depth": DEPTH, "heads": HEADS}
    if kind == "semantic":
        model = package.SemanticTransformer(num_semantic_tokens=SEMANTIC, **options)
    elif kind == "coarse":
        model = package.CoarseTransformer(
            num_semantic_tokens=SEMANTIC, codebook_size=CODEBOOK, num_coarse_quantizers=COARSE,
            **options,
        )  # fmt: skip
    else:
        model = package.FineTransformer(
            codebook_size=CODEBOOK, num_coarse_quantizers=COARSE, num_fine_quantizers=FINE,
            **options,
        )  # fmt: skip
    model.load_state_dict(weights(shapes(model)))
    return model.eval()


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


@torch.no_grad()
def logits(model: nn.Module, kind: str, condition: str) -> Tensor:
    """[B, N, V], of every target token and the one that would follow."""
    given = inputs()
    options: dict[str, Any] = {"cond_drop_prob": 1.0 if condition == "null" else 0.0}
    if condition != "without":
        # As text, which is embedded here: upstream forgets to mask embeddings that it is given.
        model.embed_text = lambda text, output_device: given["text"]
        options["text"] = ["one", "two"]
    if kind == "semantic":
        return model(ids=given["semantic"], **options)
    if kind == "coarse":
        return model(
            semantic_token_ids=given["semantic"], coarse_token_ids=given["coarse"], **options
        )[1]
    return model(given["coarse"], given["fine"], **options)[1]


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    mode = sys.argv[2]
    from benchmarks.peers import audiolm_pytorch

    package = audiolm_pytorch()
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for kind in KINDS:
        for condition in CONDITIONS:
            model = build(package, kind, condition)
            golden[f"{kind}, {condition}, {mode}"] = {
                "shapes": shapes(model),
                "logits": [round(x, 6) for x in logits(model, kind, condition).flatten().tolist()],
            }
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
