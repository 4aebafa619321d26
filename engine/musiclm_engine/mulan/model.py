"""MuLaN: one embedding space for music and its descriptions."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from musiclm_engine.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_engine.mulan.contrast import (
    Contrast,
    MultiLayerContrast,
    checked_num_layers,
    spread_layers,
)
from musiclm_engine.mulan.distributed_contrastive import (
    distributed_contrastive_loss,
    is_distributed,
)
from musiclm_engine.mulan.gradient_cache import embed_in_chunks
from musiclm_engine.mulan.lengths import checked_lengths
from musiclm_engine.mulan.text_tower import TextTransformer
from musiclm_engine.mulan.tokenizer import PAD_ID, encode_captions, unread_text
from musiclm_engine.mulan.windows import num_windows, window_batches
from musiclm_engine.mulan.words import words as words_of
from musiclm_kernels import contrastive_loss


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
        hierarchical_contrastive_loss: add the losses of layers before the last (ViCHA, arXiv
            2208.13628), each with a projection, a temperature and a bias of its own. What audio
            and text embed to comes from the last layer, as without.
        hierarchical_contrastive_loss_layers: how many, at even distances in either tower; None is
            one less than the depth of the shallower one, which is the most.
        window_seconds, stride_seconds: `embed_audio` averages over windows of longer audio.
        words: of the captions it is trained on (`words.vocabulary`), by which `unseen_words` goes;
            none if that is not known.

    Raises:
        ValueError: a tokenizer with more tokens than the text tower, a padding id other than 0, a
            window or stride that is not positive, a number of layers out of range, or any without
            the hierarchical loss, or that loss with a tower of one layer.
    """

    audio_layers_indices: Tensor
    text_layers_indices: Tensor
    multi_layer_contrastive_learning: MultiLayerContrast | None

    def __init__(
        self,
        audio_transformer: AudioSpectrogramTransformer,
        text_transformer: TextTransformer,
        dim_latent: int = 128,
        *,
        tokenizer: Tokenizer,
        decoupled_contrastive_learning: bool = True,
        sigmoid_contrastive_loss: bool = False,
        hierarchical_contrastive_loss: bool = False,
        hierarchical_contrastive_loss_layers: int | None = None,
        window_seconds: float = 10.0,
        stride_seconds: float = 1.0,
        words: Sequence[str] = (),
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
        self.words = list(words)
        self.window_samples = round(window_seconds * rate_hz)
        self.stride_samples = round(stride_seconds * rate_hz)
        self.decoupled_contrastive_learning = decoupled_contrastive_learning
        self.sigmoid_contrastive_loss = sigmoid_contrastive_loss
        self.audio_to_latents = nn.Linear(audio_transformer.dim, dim_latent)
        self.text_to_latents = nn.Linear(text_transformer.dim, dim_latent)
        self.contrast = Contrast(with_bias=sigmoid_contrastive_loss)
        self.hierarchical_contrastive_loss_layers = hierarchical_contrastive_loss_layers
        self.multi_layer_contrastive_learning = None
        if hierarchical_contrastive_loss:
            depths = audio_transformer.depth, text_transformer.depth
            num_layers = checked_num_layers(hierarchical_contrastive_loss_layers, *depths)
            self.register_buffer("audio_layers_indices", spread_layers(num_layers, depths[0]))
            self.register_buffer("text_layers_indices", spread_layers(num_layers, depths[1]))
            self.multi_layer_contrastive_learning = MultiLayerContrast(
                audio_transformer.dim,
                text_transformer.dim,
                dim_latent,
                num_layers,
                with_bias=sigmoid_contrastive_loss,
            )
        elif hierarchical_contrastive_loss_layers is not None:
            raise ValueError(
                f"hierarchical_contrastive_loss_layers={hierarchical_contrastive_loss_layers} "
                "without hierarchical_contrastive_loss; want None"
            )

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
            "hierarchical_contrastive_loss": self.multi_layer_contrastive_learning is not None,
            "hierarchical_contrastive_loss_layers": self.hierarchical_contrastive_loss_layers,
            "window_seconds": self.window_seconds,
            "stride_seconds": self.stride_seconds,
            "words": self.words,
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
        self,
        audio: Tensor,
        texts: Sequence[str],
        *,
        lengths: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The contrastive loss of B pairs, a scalar; the sum over layers if it is hierarchical.

        With several processes (torch.distributed), the pairs of all of them are one batch: this is
        a process's share of its loss, and under DistributedDataParallel the parameters get the
        gradient of the whole (`distributed_contrastive_loss`).

        Args:
            audio: (B, time) at `sample_rate_hz`; each row passes whole through the tower.
            texts: B descriptions; row i belongs to clip i, and all others are its negatives.
            lengths: (B,) samples of each row that are audio; None is all of them.
            chunk_size: pairs that pass through the towers at a time, each twice, so that a batch is
                not bounded by memory (`embed_in_chunks`); None is all of them, once.

        Raises:
            ValueError: fewer or more texts than clips, a single pair and no other process, an empty
                text, audio or lengths that the tower refuses, a chunk size below 1.
        """
        return self.contrast_with_embeddings(audio, texts, lengths=lengths, chunk_size=chunk_size)[
            0
        ]

    def contrast_with_embeddings(
        self,
        audio: Tensor,
        texts: Sequence[str],
        *,
        lengths: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`'s loss, and the embeddings that it compares: of audio and texts, (B, dim_latent).

        For losses of one's own beside the contrast. All arguments and errors as in `forward`.
        """
        alone = not is_distributed()
        least = 2 if alone else 1
        if audio.ndim != 2 or len(texts) != len(audio) or len(audio) < least:
            raise ValueError(
                f"audio has shape {tuple(audio.shape)} and there are {len(texts)} texts; "
                f"want (B, time) and B texts, with B >= {least}"
            )
        lengths = None if lengths is None else checked_lengths(lengths, audio)
        chunk_size = len(audio) if chunk_size is None else chunk_size
        ids = self._encode(texts)
        if chunk_size == len(audio):
            audio_latents = self._audio_layer_latents(audio, lengths)
            text_latents = self._text_layer_latents(ids)
        else:
            audio_latents = embed_in_chunks(self._audio_layer_latents, (audio, lengths), chunk_size)
            text_latents = embed_in_chunks(self._text_layer_latents, (ids,), chunk_size)
        contrasts = [self.contrast]
        if self.multi_layer_contrastive_learning is not None:
            contrasts.append(self.multi_layer_contrastive_learning.contrast)
        biases = [contrast.bias.flatten() for contrast in contrasts if contrast.bias is not None]
        # One call for all layers: with several processes each pair's latents are sent once.
        loss = contrastive_loss if alone else distributed_contrastive_loss
        contrast = loss(
            audio_latents.transpose(0, 1),
            text_latents.transpose(0, 1),
            torch.cat([contrast() for contrast in contrasts]),
            kind=self._kind,
            bias=torch.cat(biases) if biases else None,
        ).sum()
        return contrast, audio_latents[:, 0], text_latents[:, 0]

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
            return self._audio_latents(audio, lengths)
        if lengths is None:
            row_samples = [audio.shape[1]] * len(audio)
        else:
            row_samples = checked_lengths(lengths, audio).tolist()
        counts = num_windows(row_samples, self.window_samples, self.stride_samples)
        embeddings = torch.cat(
            [
                self._audio_latents(windows, held)
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
        return self._text_latents(self._encode(texts))

    def similarity(
        self, audio: Tensor, texts: Sequence[str], *, lengths: Tensor | None = None
    ) -> Tensor:
        """Cosine of every clip with every text, (B, number of texts), in [-1, 1].

        Raises:
            ValueError: as `embed_audio` and `embed_text`.
        """
        return self.embed_audio(audio, lengths) @ self.embed_text(texts).T

    def unread(self, text: str) -> str:
        """The end of a text that is longer than the text tower; "" of others."""
        return unread_text(self.tokenizer, text, self.text.max_seq_len)

    def unseen_words(self, text: str) -> list[str]:
        """Words of a text that were in no caption it was trained on, as far as that is known.

        It embeds them all the same, as the pieces of words it knows: to what, nobody can say.
        """
        known = {*self.words}
        return [word for word in dict.fromkeys(words_of(text)) if known and word not in known]

    @property
    def temperature(self) -> float:
        """The factor on the cosines in the last layer's loss, in [1, 100]."""
        return float(self.contrast().detach())

    @property
    def _kind(self) -> str:
        if self.sigmoid_contrastive_loss:
            return "sigmoid"
        return "decoupled" if self.decoupled_contrastive_learning else "softmax"

    def _encode(self, texts: Sequence[str]) -> Tensor:
        ids = encode_captions(self.tokenizer, texts, self.text.max_seq_len)
        return ids.to(self.text.token_emb.weight.device, non_blocking=True)

    def _audio_latents(self, audio: Tensor, lengths: Tensor | None) -> Tensor:
        return self._project(self.audio_to_latents, self.audio(audio, lengths=lengths))

    def _text_latents(self, ids: Tensor) -> Tensor:
        return self._project(self.text_to_latents, self.text(ids))

    def _audio_layer_latents(self, audio: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, layers, dim_latent) of what the loss compares: the last layer and those before."""
        layered = self.multi_layer_contrastive_learning
        if layered is None:
            return self._audio_latents(audio, lengths)[:, None]
        last, layers = self.audio(audio, lengths=lengths, return_all_layers=True)
        before = layered.audio_latents(layers[self.audio_layers_indices])
        latents = torch.cat((self.audio_to_latents(last)[:, None], before), dim=1)
        return F.normalize(latents, dim=-1)

    def _text_layer_latents(self, ids: Tensor) -> Tensor:
        layered = self.multi_layer_contrastive_learning
        if layered is None:
            return self._text_latents(ids)[:, None]
        last, layers = self.text(ids, return_all_layers=True)
        before = layered.text_latents(layers[self.text_layers_indices])
        latents = torch.cat((self.text_to_latents(last)[:, None], before), dim=1)
        return F.normalize(latents, dim=-1)

    @staticmethod
    def _project(to_latents: nn.Module, x: Tensor) -> Tensor:
        return F.normalize(to_latents(x), dim=-1)
