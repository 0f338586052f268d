"""Pages of the cache: who holds which, and what is in them. No tensors.

A page holds PAGE tokens. One that is full is known by a hash of its tokens and of all before them, and may be held by
several texts. One that nobody holds any more is kept for prompts to come, until its room is needed: the one given back
longest ago goes first, and of a text its end before its beginning. Page 0 is never given out: padding is written there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from andromeda.kernels.paged import DEFAULT_PAGE

PAGE = DEFAULT_PAGE  # tokens


def extend_hashes(hashes: list[bytes], ids: Sequence[int], pages: int) -> None:
    """Adds hashes of full pages of `ids` behind those that are there already, until there are so many.

    They decide what a prompt is answered from, so they are cryptographic: nobody can make two that are equal.
    """
    for page in range(len(hashes), pages):
        before = hashes[-1] if hashes else b""
        tokens = array("q", ids[page * PAGE : (page + 1) * PAGE]).tobytes()
        hashes.append(hashlib.blake2b(before + tokens, digest_size=16).digest())


class PagePool:
    """Pages 1 .. num_pages - 1.

    Args:
        prefix_cache: False forgets what a page holds when nobody holds it.
    """

    def __init__(self, num_pages: int, prefix_cache: bool = True) -> None:
        self.num_pages, self.prefix_cache = num_pages, prefix_cache
        self._empty = list(range(num_pages - 1, 0, -1))
        self._holders = [0] * num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, known by their hash; oldest first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that can be taken, kept ones among them."""
        return len(self._empty) + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - 1 - self.free

    def take(self) -> int | None:
        """A page, held once, with nothing in it; None: all are held."""
        if self._empty:
            page = self._empty.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages that are there of a text, from its beginning."""
        pages = []
        for known in hashes:
            page = self._page_of.get(known)
            if page is None:
                break
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Once more each, of those that `find` gave."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def register(self, page: int, known: bytes) -> None:
        """Says what a full page holds; where another is known to hold it already, that one stays known."""
        if self.prefix_cache and page not in self._hash_of and known not in self._page_of:
            self._page_of[known], self._hash_of[page] = page, known

    def release(self, pages: Sequence[int]) -> None:
        """Once less each, of one text in its order."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._hash_of:
                    self._kept[page] = None
                else:
                    self._empty.append(page)
