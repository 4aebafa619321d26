"""A state dict as a loader reads it: each entry once, so that what nobody read is found."""

from collections.abc import Iterable, Mapping

from torch import Tensor


class Entries:
    """The entries of a state dict whose names begin with a prefix."""

    def __init__(self, entries: Mapping[str, Tensor], prefix: str = "") -> None:
        self._entries = dict(entries)
        self._prefix = prefix

    def below(self, prefix: str) -> "Entries":
        """The entries below `prefix`, under the names that follow it."""
        below = Entries({}, self._prefix + prefix)
        below._entries = self._entries  # the same dictionary: what is taken here is taken there
        return below

    def names(self) -> list[str]:
        """What has not been taken yet."""
        length = len(self._prefix)
        return [name[length:] for name in self._entries if name.startswith(self._prefix)]

    def take(self, name: str) -> Tensor:
        """An entry, which is gone then.

        Raises:
            ValueError: there is none of this name.
        """
        self.peek(name)
        return self._entries.pop(self._prefix + name).detach()

    def peek(self, name: str) -> Tensor:
        """An entry, which stays; ValueError without it."""
        if self._prefix + name not in self._entries:
            raise ValueError(f"state has no {self._prefix + name}")
        return self._entries[self._prefix + name]

    def take_if_there(self, name: str) -> Tensor | None:
        return self.take(name) if self._prefix + name in self._entries else None

    def drop(self, names: Iterable[str]) -> None:
        """Take entries, or do without them."""
        for name in names:
            self._entries.pop(self._prefix + name, None)

    def check_all_taken(self) -> None:
        """Raises ValueError naming what was not taken."""
        if left := self.names():
            shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            raise ValueError(f"state has {len(left)} unknown entries: {shown}")
