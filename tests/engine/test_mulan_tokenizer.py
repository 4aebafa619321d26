import pytest

from musiclm_engine.mulan import encode_captions, train_caption_tokenizer

CAPTIONS = ["a slow hymn on a church organ", "a fast reel on a fiddle", "slow piano, minor key"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_caption_tokenizer(CAPTIONS, 400)


@pytest.mark.parametrize(
    "text",
    [
        "a slow hymn",
        "ßtraße naïve",
        "音楽とピアノ",
        "🎹🎻👩🏽‍🎤",
        "مرحبا",
        "\x00\x07",
        "  two  spaces\n",
        "[pad]",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    ids = encode_captions(tokenizer, [text], 128)[0].tolist()
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_text_is_normalised(tokenizer):
    assert tokenizer.encode("ＳＬＯＷ Piano").ids == tokenizer.encode("slow piano").ids


def test_no_text_is_padding(tokenizer):
    for text in ("[PAD]", "a [PAD] b", "!", "[UNK]", "\ud800"):
        assert 0 not in encode_captions(tokenizer, [text], 128)[0].tolist()
    assert tokenizer.id_to_token(0) == "[PAD]"


def test_learned_words_are_short_and_the_size_is_kept(tokenizer):
    assert len(tokenizer.encode("a slow hymn on a church organ").ids) < 10
    assert 257 < tokenizer.get_vocab_size() <= 400


def test_rows_are_padded_and_cut(tokenizer):
    ids = encode_captions(tokenizer, ["slow", "zzzzzzzzzzzzzzzzzzzz"], 8)
    assert ids.shape == (2, 8) and (ids[1] != 0).all()
    num_tokens = len(tokenizer.encode("slow").ids)
    assert (ids[0] != 0).sum() == num_tokens and (ids[0, num_tokens:] == 0).all()
    assert encode_captions(tokenizer, ["slow"], 8).shape == (1, num_tokens)


@pytest.mark.parametrize("texts", ["slow", [], [""], ["slow", " \n"], ["slow", None], [b"slow"]])
def test_refuses(tokenizer, texts):
    with pytest.raises(ValueError, match="texts"):
        encode_captions(tokenizer, texts, 8)


def test_training_refuses():
    with pytest.raises(ValueError, match="vocab_size=256"):
        train_caption_tokenizer(CAPTIONS, 256)
    with pytest.raises(ValueError, match="captions"):
        train_caption_tokenizer([], 300)
