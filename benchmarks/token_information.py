"""What tokens tell of a label, and how well tokens are told by those before them. All in nats."""

import numpy as np


def entropy(labels: np.ndarray) -> float:
    """H of the empirical distribution of integer labels."""
    share = np.unique(labels, return_counts=True)[1] / labels.size
    return float(-(share * np.log(share)).sum())


def mutual_information(tokens: np.ndarray, labels: np.ndarray) -> float:
    """I(tokens; labels) of two equally long rows of integers >= 0, as counted.

    Counting overstates it by about (cells - tokens - labels + 1) / (2 N): see `shuffled_floor`.
    """
    pairs = tokens.astype(np.int64) * (int(labels.max()) + 1) + labels
    return entropy(tokens) + entropy(labels) - entropy(pairs)


def normalised(information: float, tokens: np.ndarray, labels: np.ndarray) -> float:
    """NMI: information over the mean of both entropies; 0 where neither varies."""
    return 2 * information / max(entropy(tokens) + entropy(labels), 1e-12)


def shuffled_floor(tokens: np.ndarray, labels: np.ndarray, *, seed: int) -> float:
    """The mutual information that counting finds where there is none: with shuffled tokens."""
    return mutual_information(np.random.default_rng(seed).permutation(tokens), labels)


def repeat_rate(tokens: np.ndarray) -> float:
    """The share of tokens [clips, T] that are the same as the one before."""
    return float((tokens[:, 1:] == tokens[:, :-1]).mean())


def ngram_nats(fitted: np.ndarray, held_out: np.ndarray, num_tokens: int, order: int) -> float:
    """Nats a token of held-out clips under an n-gram model of others.

    Witten-Bell smoothing: after a context that was seen c times with d different followers, the
    shorter context has the weight d / (c + d); the shortest is the uniform distribution.

    Args:
        fitted, held_out: [clips, T] tokens; contexts do not cross clips.
        num_tokens: K.
        order: 1 for single tokens, 2 for pairs, 3 for triples.
    """
    skipped = order - 1  # of each clip, so that every context is whole
    fitted, held_out = fitted.astype(np.int64), held_out.astype(np.int64)
    probability = np.full(held_out[:, skipped:].shape, 1 / num_tokens)
    for length in range(order):
        seen, context = (
            _contexts(fitted, length, num_tokens),
            _contexts(held_out[:, skipped - length :], length, num_tokens),
        )
        pairs, pair_counts = np.unique(seen * num_tokens + fitted[:, length:], return_counts=True)
        count = _looked_up(*np.unique(seen, return_counts=True), context)
        followers = _looked_up(*np.unique(pairs // num_tokens, return_counts=True), context)
        pair = _looked_up(pairs, pair_counts, context * num_tokens + held_out[:, skipped:])
        smoothed = (pair + followers * probability) / np.maximum(count + followers, 1)
        probability = np.where(count > 0, smoothed, probability)
    return float(-np.log(probability).mean())


def _contexts(tokens: np.ndarray, length: int, num_tokens: int) -> np.ndarray:
    """The `length` tokens before each of tokens[:, length:], as one number."""
    number = np.zeros_like(tokens[:, length:])
    for back in range(length, 0, -1):
        number = number * num_tokens + tokens[:, length - back : tokens.shape[1] - back]
    return number


def _looked_up(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The count of each wanted key, 0 where there is none; keys ascend."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, counts[place], 0)
