"""Conditioning tokens as a transformer takes them in."""

import torch
from torch import Tensor, nn


class ResidualEmbedding(nn.Module):
    """Tokens of a residual quantiser; each stands for all that is decoded up to its level.

        embedding[m] = expand(codes[0][token_0] + ... + codes[m][token_m])

    With the quantiser's own codebooks for codes (`take_codebooks`), the last embedding is a linear
    map of the quantised vector, so what a linear map of the vector tells need not be learnt
    code by code. Token `size` of each level stands for none.

    Args:
        num_levels: M.
        size: C, values of a token.
        width: D of a code.
        dim: of an embedding.
    """

    def __init__(self, num_levels: int, size: int, width: int, dim: int) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.size = size
        self.codes = nn.Embedding(num_levels * (size + 1), width)
        self.expand = nn.Linear(width, dim)
        nn.init.normal_(self.codes.weight, std=width**-0.5)

    @torch.no_grad()
    def take_codebooks(self, codebooks: Tensor) -> None:
        """Put a quantiser's codebooks [M, C, D] in the place of codes, which then do not learn.

        Raises:
            ValueError: codebooks of another shape.
        """
        wanted = self.num_levels, self.size, self.codes.embedding_dim
        if tuple(codebooks.shape) != wanted:
            raise ValueError(f"codebooks is {tuple(codebooks.shape)}, wanted {wanted}")
        none = codebooks.new_zeros(self.num_levels, 1, self.codes.embedding_dim)
        self.codes.weight.copy_(torch.cat([codebooks, none], dim=1).flatten(0, 1))
        self.codes.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, M] int64, values up to size -> [B, M, dim]."""
        first = torch.arange(self.num_levels, device=tokens.device) * (self.size + 1)
        decoded: Tensor = self.codes(tokens + first).cumsum(1)
        embedded: Tensor = self.expand(decoded)
        return embedded
