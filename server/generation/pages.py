"""Whose page is whose: free, held by sequences, or kept for the prefix that it holds.

Book-keeping over numbers only; the memory behind them is ``server.generation.kv_cache``'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from itertools import count


class PagePool:
    """Pages by number. One thread uses it.

    A full page of a prefix can be named by (what comes before it, its tokens). What comes before is
    a number that each named page has of its own, or a root, so two chains are equal only if all of
    their tokens and their roots are.

    Args:
        first: Number of the first page; those below are nobody's.
        pages: How many there are.
    """

    def __init__(self, first: int, pages: int) -> None:
        self.total = pages
        self._free = list(range(first + pages - 1, first - 1, -1))
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest first
        self._named: dict[Hashable, int] = {}
        self._names: dict[int, tuple[Hashable, int]] = {}  # name, and the number after it
        self._numbers = count()

    @property
    def kept(self) -> int:
        """Pages that nobody holds and that still have a name."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages that could be taken now, the kept ones included."""
        return len(self._free) + len(self._kept)

    def take(self, pages: int) -> list[int] | None:
        """So many pages for one holder, or None; then nothing has changed. Kept ones go last."""
        if pages > self.available:
            return None
        while len(self._free) < pages:
            page, _ = self._kept.popitem(last=False)
            del self._named[self._names.pop(page)[0]]
            self._free.append(page)
        taken = [self._free.pop() for _ in range(pages)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def hold(self, page: int) -> None:
        """One more holder of a page that has a name."""
        self._kept.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def release(self, pages: Iterable[int], *, forget: bool = False) -> None:
        """One holder less of each. The last named one is kept, unless it is to be forgotten.

        Args:
            pages: In the order of their tokens: the last are given up first.
            forget: Nobody else may ever find them; those that others hold keep their names.
        """
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._names and not forget:
                self._kept[page] = None
                continue
            if page in self._names:
                del self._named[self._names.pop(page)[0]]
            self._free.append(page)

    def find(self, before: Hashable, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """The page of this name and the number after it, or None."""
        page = self._named.get((before, tokens))
        return None if page is None else (page, self._names[page][1])

    def name(self, page: int, before: Hashable, tokens: tuple[int, ...]) -> int:
        """Name a full page; the number that comes before the next one of its chain.

        Where another page has the name already, that one keeps it.
        """
        found = self.find(before, tokens)
        if found is not None:
            return found[1]
        number = next(self._numbers)
        self._named[before, tokens] = page
        self._names[page] = ((before, tokens), number)
        return number
