"""What is said of a prompt when the music may well be something else."""

from collections.abc import Sequence


def doubt_of_words(prompt: str, unseen: Sequence[str]) -> str | None:
    """Of words that no caption of the training held (`MuLaN.unseen_words`); None if all are known."""
    if not unseen:
        return None
    return (
        f"The model has heard no music called {', '.join(unseen)}: it will make the nearest to "
        f"{prompt!r} that it knows."
    )


def doubt_of_length(unread: str) -> str | None:
    """Of the end of a prompt that is too long to be read (`MusicLM.unread`); None if all is read."""
    if not unread:
        return None
    return f"A prompt is too long to be read whole: its end is left out, {unread!r}."


def doubt_of_similarity(prompt: str, best: float, usual: float | None) -> str | None:
    """Of the best candidate's MuLaN similarity; None if it is usual, or it is not known what is.

    Args:
        prompt: what was asked for.
        best: the similarity.
        usual: `MusicLM.usual_similarity`.
    """
    if usual is None or best >= usual:
        return None
    return (
        f"The best candidate for {prompt!r} has a MuLaN similarity of {best:.3f}; of captions like "
        f"those it was trained on, 95 % reach {usual:.3f}: this may not be what you asked for."
    )
