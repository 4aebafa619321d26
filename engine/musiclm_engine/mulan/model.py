"""MuLaN: one embedding space for music and its descriptions."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from musiclm_engine.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_engine.mulan.lengths import checked_lengths
from musiclm_engine.mulan.text_tower import TextTransformer
from musiclm_engine.mulan.tokenizer import PAD_ID, encode_captions
from musiclm_engine.mulan.windows import num_windows, window_batches
from musiclm_kernels import contrastive_loss

INITIAL_TEMPERATURE = 10.0  # factor on the cosines: MuLan's tau of 0.1
MAX_TEMPERATURE = 100.0  # as in CLIP (arXiv 2103.00020, section 2.5)
INITIAL_SIGMOID_BIAS = -10.0  # arXiv 2303.15343, section 3.2


class MuLaN(nn.Module):
    """Two towers trained so that a clip and its description embed alike.

    MuLan (Huang et al., arXiv 2208.12415), with the choice between its softmax loss, the decoupled
    one (Yeh et al., arXiv 2110.06848) and the sigmoid one (Zhai et al., arXiv 2303.15343). All
    are computed from logits in a stable form, and the temperature stays within [1, 100].

    Args:
        audio_transformer, text_transformer: the towers; their widths may differ.
        dim_latent: D of the shared embedding.
        tokenizer: encodes texts with ids below the text tower's `num_tokens`, padding 0
            (`train_caption_tokenizer`).
        decoupled_contrastive_learning: leave the positive pair out of the denominators.
        sigmoid_contrastive_loss: sigmoid loss; replaces the decoupled one.
        window_seconds, stride_seconds: `embed_audio` averages over windows of longer audio.

    Raises:
        ValueError: a tokenizer with more tokens than the text tower, a padding id other than 0, or
            a window or stride that is not positive.
    """

    def __init__(
        self,
        audio_transformer: AudioSpectrogramTransformer,
        text_transformer: TextTransformer,
        dim_latent: int = 128,
        *,
        tokenizer: Tokenizer,
        decoupled_contrastive_learning: bool = True,
        sigmoid_contrastive_loss: bool = False,
        window_seconds: float = 10.0,
        stride_seconds: float = 1.0,
    ):
        super().__init__()
        if tokenizer.get_vocab_size() > text_transformer.num_tokens:
            raise ValueError(
                f"tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"text_transformer num_tokens={text_transformer.num_tokens}; want no more than that"
            )
        if text_transformer.pad_id != PAD_ID:
            raise ValueError(f"text_transformer.pad_id={text_transformer.pad_id}; want {PAD_ID}")
        rate_hz = audio_transformer.sample_rate_hz
        if window_seconds * rate_hz < 1 or stride_seconds * rate_hz < 1:
            raise ValueError(
                f"window_seconds={window_seconds} and stride_seconds={stride_seconds} "
                "must hold at least a sample"
            )
        self.audio = audio_transformer
        self.text = text_transformer
        self.tokenizer = tokenizer
        self.dim_latent = dim_latent
        self.window_seconds = window_seconds
        self.stride_seconds = stride_seconds
        self.window_samples = round(window_seconds * rate_hz)
        self.stride_samples = round(stride_seconds * rate_hz)
        self.decoupled_contrastive_learning = decoupled_contrastive_learning
        self.sigmoid_contrastive_loss = sigmoid_contrastive_loss
        self.audio_to_latents = nn.Linear(audio_transformer.dim, dim_latent)
        self.text_to_latents = nn.Linear(text_transformer.dim, dim_latent)
        self.contrast = _Contrast(with_bias=sigmoid_contrastive_loss)

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the audio it takes."""
        return self.audio.sample_rate_hz

    @property
    def config(self) -> dict[str, Any]:
        """All that `from_config` needs, JSON-able: arguments, both towers, the tokenizer."""
        return {
            "audio_transformer": self.audio.config,
            "text_transformer": self.text.config,
            "dim_latent": self.dim_latent,
            "tokenizer": json.loads(self.tokenizer.to_str()),
            "decoupled_contrastive_learning": self.decoupled_contrastive_learning,
            "sigmoid_contrastive_loss": self.sigmoid_contrastive_loss,
            "window_seconds": self.window_seconds,
            "stride_seconds": self.stride_seconds,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MuLaN":
        """A model of this shape and tokenizer, with random weights."""
        rest = dict(config)
        return cls(
            AudioSpectrogramTransformer.from_config(rest.pop("audio_transformer")),
            TextTransformer.from_config(rest.pop("text_transformer")),
            tokenizer=Tokenizer.from_str(json.dumps(rest.pop("tokenizer"))),
            **rest,
        )

    def forward(
        self, audio: Tensor, texts: Sequence[str], *, lengths: Tensor | None = None
    ) -> Tensor:
        """The contrastive loss of B pairs, a scalar.

        Args:
            audio: (B, time) at `sample_rate_hz`; each row passes whole through the tower.
            texts: B descriptions; row i belongs to clip i, and all others are its negatives.
            lengths: (B,) samples of each row that are audio; None is all of them.

        Raises:
            ValueError: fewer or more texts than clips, a single pair, an empty text, audio or
                lengths that the tower refuses.
        """
        if audio.ndim != 2 or len(texts) != len(audio) or len(audio) < 2:
            raise ValueError(
                f"audio has shape {tuple(audio.shape)} and there are {len(texts)} texts; "
                "want (B, time) and B texts, with B >= 2"
            )
        audio_latents = self._project(self.audio_to_latents, self.audio(audio, lengths=lengths))
        return contrastive_loss(
            audio_latents,
            self.embed_text(texts),
            self.contrast(),
            kind=self._kind,
            bias=None if self.contrast.bias is None else self.contrast.bias.reshape(()),
        )

    def embed_audio(self, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, time) -> l2-normalised embeddings (B, dim_latent).

        A clip longer than `window_seconds` is embedded window by window, one every
        `stride_seconds` as long as it fits, and the mean is normalised again (MusicLM,
        arXiv 2301.11325, section 3.1). Call `eval()` before: in training, patches are dropped.

        Args:
            audio: at `sample_rate_hz`, floating point.
            lengths: (B,) samples of each row that are audio; None is all of them.

        Raises:
            ValueError: audio that is not (B, time) or is empty, lengths outside [1, time].
        """
        if audio.ndim != 2 or audio.shape[1] <= self.window_samples:
            return self._project(self.audio_to_latents, self.audio(audio, lengths=lengths))
        if lengths is None:
            row_samples = [audio.shape[1]] * len(audio)
        else:
            row_samples = checked_lengths(lengths, audio).tolist()
        counts = num_windows(row_samples, self.window_samples, self.stride_samples)
        embeddings = torch.cat(
            [
                self._project(self.audio_to_latents, self.audio(windows, lengths=held))
                for windows, held in window_batches(
                    audio, row_samples, self.window_samples, self.stride_samples
                )
            ]
        )
        means = torch.stack([rows.mean(dim=0) for rows in embeddings.split(counts)])
        return F.normalize(means, dim=-1)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> l2-normalised embeddings (B, dim_latent).

        Raises:
            ValueError: texts that are not a non-empty list of str, or an empty text.
        """
        ids = encode_captions(self.tokenizer, texts, self.text.max_seq_len)
        ids = ids.to(self.text.token_emb.weight.device)
        return self._project(self.text_to_latents, self.text(ids))

    def similarity(
        self, audio: Tensor, texts: Sequence[str], *, lengths: Tensor | None = None
    ) -> Tensor:
        """Cosine of every clip with every text, (B, number of texts), in [-1, 1].

        Raises:
            ValueError: as `embed_audio` and `embed_text`.
        """
        return self.embed_audio(audio, lengths) @ self.embed_text(texts).T

    @property
    def temperature(self) -> float:
        """The factor on the cosines in the loss, in [1, 100]."""
        return float(self.contrast().detach())

    @property
    def _kind(self) -> str:
        if self.sigmoid_contrastive_loss:
            return "sigmoid"
        return "decoupled" if self.decoupled_contrastive_learning else "softmax"

    @staticmethod
    def _project(to_latents: nn.Module, x: Tensor) -> Tensor:
        return F.normalize(to_latents(x), dim=-1)


class _Contrast(nn.Module):
    """The loss's learned scalars."""

    bias: nn.Parameter | None

    def __init__(self, with_bias: bool):
        super().__init__()
        self.temperatures = nn.Parameter(torch.full((1, 1, 1), math.log(INITIAL_TEMPERATURE)))
        bias = torch.full((1, 1, 1), INITIAL_SIGMOID_BIAS) if with_bias else None
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self) -> Tensor:
        """The temperature, a scalar."""
        limit = math.log(MAX_TEMPERATURE)
        if self.training:
            # Held at the limit itself: beyond it no gradient would bring the parameter back.
            self.temperatures.data.clamp_(0, limit)
        return self.temperatures.clamp(0, limit).exp().reshape(())
