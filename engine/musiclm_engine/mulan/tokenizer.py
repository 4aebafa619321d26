"""A byte-level BPE for captions."""

import json
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

PAD_ID = 0
PAD_TOKEN = "[PAD]"  # never made by merging: captions are lower-cased first
NUM_BYTES = 256


def train_caption_tokenizer(
    captions: Iterable[str], vocab_size: int, *, splits_digits: bool = False
) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2).

    Text is NFKC-normalised and lower-cased. All 256 bytes are tokens, so any string encodes; id 0
    is padding and no text encodes to it, not even "[PAD]".

    Args:
        captions: what to learn the merges from.
        vocab_size: at least 257 (padding and the bytes); few captions give a smaller vocabulary.
        splits_digits: each digit is a token of its own, so that numbers share what is learnt of
            their digits.

    Raises:
        ValueError: `vocab_size` below 257, or no captions.
    """
    if vocab_size < NUM_BYTES + 1:
        raise ValueError(f"vocab_size={vocab_size}; want at least {NUM_BYTES + 1}: bytes, padding")
    captions = [_encodable(caption) for caption in captions]
    if not captions:
        raise ValueError("captions is empty; want at least one to learn from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if splits_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.Sequence([digits, words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    # Padding keeps its id in the vocabulary but is no longer looked for in the text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(state))


def encode_captions(tokenizer: Tokenizer, captions: Sequence[str], max_seq_len: int) -> Tensor:
    """Captions -> int64 ids (B, T), padded with id 0 to the longest of them.

    Captions longer than `max_seq_len` tokens are cut at the end, so T <= max_seq_len.

    Raises:
        ValueError: captions that are not a non-empty list of str, or a caption without text.
    """
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"texts is {_shown(captions)}; want a list of str")
    if len(captions) == 0:
        raise ValueError("texts is empty; want at least one str")
    for index, caption in enumerate(captions):
        if not caption.strip():
            raise ValueError(f"texts[{index}] is {caption!r}; want a description, not an empty str")
    rows = [
        encoding.ids[:max_seq_len]
        for encoding in tokenizer.encode_batch([_encodable(caption) for caption in captions])
    ]
    ids = torch.full((len(rows), max(map(len, rows))), PAD_ID, dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def unread_text(tokenizer: Tokenizer, caption: str, max_seq_len: int) -> str:
    """The end of a caption that `encode_captions` cuts off; "" if it does not."""
    encoding = tokenizer.encode(_encodable(caption))
    if len(encoding.ids) <= max_seq_len:
        return ""
    return caption[encoding.offsets[max_seq_len][0] :].strip()


def _encodable(caption: str) -> str:
    """A lone surrogate has no UTF-8 form and becomes "?"."""
    return caption.encode("utf-8", "replace").decode("utf-8")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
