"""What the model has read and need not read again: keys and values of beginnings of conversations, page by page.

A radix tree over pages of token ids: a conversation stands on the path from the root to its last page, and shares the
pages of what it begins with. A page is never changed, but for a last one, in which a conversation goes on. So that no
answer's time tells one tenant what another has said, a page belongs to one tenant, but for those that hold no one's
text, such as a prompt; the room is theirs in common.
"""

import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from guard.telemetry import Metrics
from guard.types import PAGE, Prefix, Scores, Tokens

_Ids = tuple[int, ...]
_Key = tuple[str, _Ids]  # whose a page is, and the tokens that it holds

_ANYONE = ""
_LOSS = 8  # tokens that a last page may lose as a conversation goes on in it: an end token and half a word, say
_KEPT = 5.0  # seconds that a page is left to whom it served; or, of too many streams, each would push out the others


@runtime_checkable
class Paged(Protocol):
    """A model that keeps what it reads in pages; see guard.model.turn_classifier."""

    @property
    def page_bytes(self) -> int: ...

    def reserve(self, pages: int) -> None: ...

    def copy(self, source: int, target: int) -> None: ...

    def score(self, batch: Sequence[Tokens], prefixes: Sequence[Prefix] = ()) -> list[tuple[Scores, ...]]: ...


@dataclass(slots=True, eq=False)
class _Node:
    """A page: the tokens that it holds, PAGE of them or fewer, and the pages that follow it. The root holds none."""

    key: _Key = (_ANYONE, ())
    page: int = -1
    parent: "_Node | None" = None
    users: int = 0
    used: float = 0.0
    children: "dict[_Key, _Node]" = field(default_factory=dict)
    order: list[_Key] = field(default_factory=list)  # keys of `children`, sorted

    def nearest(self, key: _Key) -> "tuple[_Node | None, int]":
        """The tenant's child that begins most like what `key` holds, and how many tokens they have in common."""
        place = bisect_left(self.order, key)  # what begins alike stands together
        found: tuple[_Node | None, int] = None, 0
        for near in self.order[max(0, place - 1) : place + 1]:
            common = _common(near[1], key[1]) if near[0] == key[0] else 0
            if common > found[1]:
                found = self.children.get(near), common
        return found

    def add(self, child: "_Node") -> None:
        self.children[child.key] = child
        insort(self.order, child.key)

    def remove(self, child: "_Node") -> None:
        del self.children[child.key]
        del self.order[bisect_left(self.order, child.key)]


class _Lease(NamedTuple):
    """What serves one sequence while it is read: its path in the tree, root first, and pages for what follows."""

    path: list[_Node]
    new: list[int]
    prefix: Prefix


class PrefixCache:
    """Scores by a model that reads only what is new. All but `unread` is for the thread that the model runs on."""

    def __init__(self, model: Paged, size: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        """`size` is in bytes."""
        self._model = model
        self._metrics = metrics
        self._clock = clock
        self._pages = size // model.page_bytes
        model.reserve(self._pages)
        self._free = list(range(self._pages - 1, -1, -1))  # the lowest go first: memory is taken as it is touched
        self._root = _Node()
        self._idle: OrderedDict[_Node, None] = OrderedDict()  # that nobody uses now; least recently used first

    def unread(self, tokens: Tokens) -> int:
        """How many tokens there are to read now, about; for any thread, while another changes the tree."""
        path, (_, common) = _find(self._root, _keys(tokens))
        return len(tokens.ids) - min(PAGE * (len(path) - 1) + common, _first_read(tokens))

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        """What the model makes of the batch. What it reads of tokens with a tenant is kept, and what is no one's."""
        leases = [self._take(tokens) for tokens in batch]
        is_read = False
        try:
            scores = self._model.score(batch, [lease.prefix for lease in leases])
            is_read = True
        finally:
            for tokens, lease in zip(batch, leases, strict=True):
                self._give_back(lease, _keys(tokens), is_read)
            self._metrics.prefix_cache_bytes.set((self._pages - len(self._free)) * self._model.page_bytes)
        return scores

    def _take(self, tokens: Tokens) -> _Lease:
        """Finds what is held of a sequence, and pages for the rest as far as there are any."""
        keys = _keys(tokens)
        if not keys:
            return _Lease([], [], Prefix())
        path, (node, common) = _find(self._root, keys)
        for own in path:
            self._use(own)
        kept = PAGE * (len(keys) - 1) + len(keys[-1][1])
        written, new = min(PAGE * (len(path) - 1), kept), list[int]()
        if node is not None and (page := self._going_on(node, common)) is not None:
            new.append(page)
            written += common
        while len(path) - 1 + len(new) < len(keys) and (page := self._page()) is not None:
            new.append(page)
        held = min(written, _first_read(tokens))
        self._metrics.prefix_cache_tokens.labels("held").inc(held)
        self._metrics.prefix_cache_tokens.labels("read").inc(len(tokens.ids) - held)
        return _Lease(path, new, Prefix(held, written, (*(own.page for own in path[1:]), *new)))

    def _going_on(self, node: _Node, common: int) -> int | None:
        """A page with the first tokens of that of `node`: that one itself where little is lost by it, or a copy."""
        if node in self._idle and not node.children and len(node.key[1]) - common <= _LOSS:
            self._forget(node)
            return node.page
        page = self._page() if common > _LOSS else None
        if page is not None:
            self._model.copy(node.page, page)
        return page

    def _give_back(self, lease: _Lease, keys: Sequence[_Key], is_read: bool) -> None:
        """The new pages with what was read go into the tree; then this sequence uses none of them."""
        path = list(lease.path)
        for page in lease.new:
            own = keys[len(path) - 1]
            if not is_read or own in path[-1].children:  # or a neighbour in the batch began alike
                self._free.append(page)
            else:
                path[-1].add(_Node(own, page, path[-1]))
            if is_read:
                path.append(path[-1].children[own])
                self._use(path[-1])
        now = self._clock()
        for node in reversed(path):  # so that what follows a page stands before it among the idle
            node.users -= 1
            node.used = now
            if not node.users and node.parent is not None:
                self._idle[node] = None

    def _use(self, node: _Node) -> None:
        self._idle.pop(node, None)
        node.users += 1

    def _page(self) -> int | None:
        """A page for something new; None where all serve others."""
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._idle), None)
        if oldest is None or oldest.used > self._clock() - _KEPT:
            return None
        self._forget(oldest)
        return oldest.page

    def _forget(self, node: _Node) -> None:
        assert node.parent is not None, "the root has no page"
        assert not node.children, "what follows a page was used no later than that"
        del self._idle[node]
        node.parent.remove(node)


def _keys(tokens: Tokens) -> list[_Key]:
    """The pages that are to hold the tokens, as far as they are kept: all of a tenant's, and whole ones of no one's."""
    shared = tokens.shared - tokens.shared % PAGE
    end = shared if tokens.tenant is None else len(tokens.ids) if tokens.kept is None else tokens.kept
    own = tokens.tenant or _ANYONE
    return [
        (_ANYONE if start < shared else own, tokens.ids[start : min(start + PAGE, end)])
        for start in range(0, end, PAGE)
    ]


def _find(root: _Node, keys: Sequence[_Key]) -> tuple[list[_Node], tuple[_Node | None, int]]:
    """The path of pages that a sequence begins with, or ends in; the page that goes on most like it, and how far."""
    path = [root]
    for key in keys:
        child = path[-1].children.get(key)
        if child is None:
            child, common = path[-1].nearest(key)
            if child is None or common < len(key[1]):
                return path, (child, common)
        path.append(child)
    return path, (None, 0)


def _first_read(tokens: Tokens) -> int:
    return min(span.end for span in tokens.spans) - 1


def _common(one: _Ids, other: _Ids) -> int:
    """How many tokens the two begin with alike."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
