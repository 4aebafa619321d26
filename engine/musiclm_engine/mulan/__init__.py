"""MuLaN: the joint embedding of audio and text, and its quantiser."""

from musiclm_engine.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_engine.mulan.model import MuLaN
from musiclm_engine.mulan.quantizer import MuLaNEmbedQuantizer
from musiclm_engine.mulan.text_tower import TextTransformer
from musiclm_engine.mulan.tokenizer import encode_captions, train_caption_tokenizer, unread_text

__all__ = [
    "AudioSpectrogramTransformer",
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "TextTransformer",
    "encode_captions",
    "train_caption_tokenizer",
    "unread_text",
]
