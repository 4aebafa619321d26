"""What one level and many levels of vector quantisation have in common."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.quantize.codebook_stack import Batches, CodebookStack
from musiclm_engine.quantize.gradient import quantize_with_gradient
from musiclm_engine.quantize.options import QuantizerOptions
from musiclm_kernels import rvq_encode


class Quantizer(nn.Module):
    """Vectors in any layout, projections, masks, losses and gradients around a stack of codebooks."""

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_levels: int,
        codebook_dim: int | None,
        options: QuantizerOptions,
    ) -> None:
        super().__init__()
        width = dim if codebook_dim is None else codebook_dim
        if min(dim, codebook_size, num_levels, width) < 1:
            raise ValueError(
                f"dim={dim}, codebook_size={codebook_size}, num_quantizers={num_levels}, "
                f"codebook_dim={codebook_dim}; want each at least 1"
            )
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_dim = width
        self.options = options
        self.has_projections = width != dim
        self.project_in = nn.Linear(dim, width) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(width, dim) if self.has_projections else nn.Identity()
        self.has_channels_second = (
            options.accept_image_fmap or options.accept_3d_fmap or not options.channel_last
        )
        rotation = options.rotation_trick
        self._rotation = width > 1 if rotation is None else rotation

    @property
    def stack(self) -> CodebookStack:
        """The codebooks, under the name that upstream's state dict begins with."""
        raise NotImplementedError

    @property
    def is_initialised(self) -> bool:
        """Whether all codebooks hold codes: drawn, fitted, loaded, or from a first batch."""
        return self.stack.is_initialised

    @torch.no_grad()
    def fit(self, batches: Batches, *, seed: int, iterations: int = 20) -> None:
        """Fit all codebooks to a data set by k-means, each level to what those before it left.

        Args:
            batches: vectors in the layout of `forward`: all of them, or a function that gives them
                batch by batch, from the start at each call. Every process must be given the same.
            seed: of the starting rows and replacements.
            iterations: Lloyd steps a level.

        Raises:
            ValueError: batches of another shape, not finite, with fewer vectors than codes, or other
                ones at the next call; iterations below 1.
        """

        def latents(batch: Tensor) -> Tensor:
            vectors = self._channels_last(batch.to(self.stack.embed.device))
            if isinstance(self.project_in, nn.Linear):
                vectors = self.project_in(vectors.to(self.project_in.weight.dtype))
            return vectors.reshape(-1, self.codebook_dim).to(self.stack.embed.dtype)

        data = latents(batches) if isinstance(batches, Tensor) else lambda: map(latents, batches())
        self.stack.fit(data, seed=seed, iterations=iterations)

    def _quantize(
        self,
        x: Tensor,
        mask: Tensor | None,
        wanted: Tensor | None,
        freeze_codebook: bool | None,
        levels_kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x in its layout -> quantized in the same, codes [B, ..., Q], and losses [Q]: the weighted
        commitment losses, zeros in evaluation; or, with codes wanted [B, ..., Q], their
        cross-entropies."""
        vectors = self._channels_last(x)
        shape = vectors.shape[:-1]
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}, wanted bool of {tuple(shape)}"
            )
        num_levels = len(self.stack.embed)
        if wanted is not None and wanted.shape != (*shape, num_levels):
            raise ValueError(
                f"indices are {tuple(wanted.shape)}, wanted {(*shape, num_levels)}: levels last"
            )
        latents = self.project_in(vectors)
        stack, counted = self.stack, None if mask is None else mask.reshape(-1)
        rows = latents.reshape(-1, self.codebook_dim).to(stack.embed.dtype)
        is_first = stack.initialise(rows.detach(), counted)
        codes, quantized = rvq_encode(rows, stack.embed, mode="fast" if self.training else "exact")
        losses = rows.new_zeros(codes.shape[1], dtype=torch.float32)
        if wanted is not None:
            losses = self._cross_entropies(rows, codes, wanted.reshape(codes.shape))
        codes = self._left_out(codes, shape, counted, levels_kept)
        if self.training:
            quantized, errors = quantize_with_gradient(
                rows, codes, stack.embed, rotation=self._rotation
            )
            if wanted is None:
                losses = errors.float() * self.options.commitment_weight
            is_frozen = self.options.freeze_codebook if freeze_codebook is None else freeze_codebook
            if not is_frozen:
                # Codes that the first batch left empty wait for vectors that it had not.
                stack.follow(rows.detach(), codes, replace_dead=not is_first)
        out = self.project_out(quantized.to(latents.dtype).view(latents.shape))
        if mask is not None:
            keeps = not self.options.return_zeros_for_masked_padding
            out = out.where(mask[..., None], vectors if keeps else 0.0)
        return self._channels_back(out), codes.view(*shape, num_levels), losses

    def _left_out(
        self, codes: Tensor, shape: torch.Size, counted: Tensor | None, levels_kept: Tensor | None
    ) -> Tensor:
        """Codes [N, Q] with -1 for vectors that do not count, and from level levels_kept on, a
        number for all vectors [] or for each item [B]."""
        if levels_kept is not None:
            dropped = torch.arange(codes.shape[1], device=codes.device) >= levels_kept.view(
                -1, 1, 1
            )
            by_item = codes.view(shape[0], math.prod(shape[1:]), codes.shape[1])
            codes = by_item.masked_fill(dropped, -1).view(codes.shape)
        return codes if counted is None else codes.masked_fill(~counted[:, None], -1)

    def _cross_entropies(self, rows: Tensor, codes: Tensor, wanted: Tensor) -> Tensor:
        """[Q]: of the codes wanted, under the softmax of negative distances to what x's own codes
        leave at each level; -1 counts nowhere."""
        losses = []
        for level, book in enumerate(self.stack.embed.detach().clone()):
            logits = -torch.cdist(rows, book)
            losses.append(F.cross_entropy(logits, wanted[:, level], ignore_index=-1))
            rows = rows - book[codes[:, level]]
        return torch.stack(losses)

    def _channels_last(self, x: Tensor) -> Tensor:
        vectors = x.movedim(1, -1) if self.has_channels_second and x.dim() > 2 else x
        if x.dim() < 2 or vectors.shape[-1] != self.dim or not x.is_floating_point():
            layout = (
                f"[B, {self.dim}, ...]" if self.has_channels_second else f"[B, ..., {self.dim}]"
            )
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, wanted floats {layout}")
        return vectors

    def _channels_back(self, vectors: Tensor) -> Tensor:
        return vectors.movedim(-1, 1) if self.has_channels_second else vectors
