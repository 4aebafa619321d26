"""The tempo that a caption asks for, for a semantic stage that counts beats."""

import json
from collections.abc import Sequence
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from musiclm_engine.audiolm.beat_clock import NUM_TEMPI
from musiclm_engine.mulan import TextTransformer, encode_captions, unread_text
from musiclm_kernels import sample_logits

SHARPENING = 3.0  # of p, before a draw: what is unlikely is mostly what the words are vague about
NEARBY = 3  # tokens: 5 %


class TempoReader(nn.Module):
    """Captions -> how likely each tempo is, by a small transformer over their words.

    It reads the number where one is stated, and where none is knows what such music is played at.
    MuLaN's embedding cannot tell it: of a caption it keeps what can be heard in ten seconds of
    audio, and numbers can not (`docs/decisions/0016-a-reader-of-tempi.md`).

    Args:
        text: whose output all is read from.
        tokenizer: of captions (`train_caption_tokenizer`), digit by digit.

    Raises:
        ValueError: the tokenizer has more tokens than text.
    """

    def __init__(self, text: TextTransformer, *, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.get_vocab_size() > text.num_tokens:
            raise ValueError(
                f"tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"wanted at most the {text.num_tokens} of text"
            )
        self.text = text
        self.tokenizer = tokenizer
        self.to_logits = nn.Linear(text.dim, NUM_TEMPI)

    @property
    def config(self) -> dict[str, Any]:
        return {"text": self.text.config, "tokenizer": json.loads(self.tokenizer.to_str())}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(
            TextTransformer.from_config(config["text"]),
            tokenizer=Tokenizer.from_str(json.dumps(config["tokenizer"])),
        )

    def forward(self, captions: Sequence[str]) -> Tensor:
        """B captions -> logits [B, NUM_TEMPI].

        Raises:
            ValueError: there are none, or one without text.
        """
        ids = encode_captions(self.tokenizer, captions, self.text.max_seq_len)
        embedding = self.text(ids.to(self.to_logits.weight.device, non_blocking=True))
        return self.to_logits(embedding)

    def unread(self, caption: str) -> str:
        """The end of a caption that is longer than what is read; "" of others."""
        return unread_text(self.tokenizer, caption, self.text.max_seq_len)

    @torch.inference_mode()
    def choose(self, captions: Sequence[str], seeds: Tensor, *, temperature: float = 1.0) -> Tensor:
        """A tempo for each caption.

        Words say a tempo to a few per cent: p has a hill there, whose mean is nearer to what was
        said than any draw from it. So which hill is drawn, from p sharpened, and then its mean is
        taken.

        Args:
            captions: B.
            seeds: [B] int64, of the draws.
            temperature: 0 takes the likeliest.

        Returns:
            [B] int64 tokens (`audiolm.beat_clock.bpm_of`).
        """
        logits = self(captions).float()
        drawn = sample_logits(
            logits, seeds=seeds.to(logits.device), step=0, temperature=temperature / SHARPENING
        )
        return _mean_nearby(logits.softmax(-1), drawn)


def _mean_nearby(p: Tensor, tempo: Tensor) -> Tensor:
    """The mean of p [B, NUM_TEMPI] within NEARBY tokens of each of tempo [B], to the next token."""
    tokens = torch.arange(NUM_TEMPI, device=p.device)
    p = p * ((tokens - tempo[:, None]).abs() <= NEARBY)
    return torch.round((p * tokens).sum(1) / p.sum(1)).long()
