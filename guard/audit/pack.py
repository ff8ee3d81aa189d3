"""Passes of the model that are as full as can be, out of what a look-ahead has in hand."""

from collections.abc import Sequence


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Places of things of those sizes, in bins of that room: first fit, the largest first.

    One that is larger than a bin has one for itself. At most 11/9 of the fewest bins that could do, and one more
    (Johnson 1973); of sizes as texts have them, nearly none.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        size = sizes[place]
        fits = next((number for number, space in enumerate(left) if space >= size), None)
        if fits is None:
            bins.append([place])
            left.append(room - size)
        else:
            bins[fits].append(place)
            left[fits] -= size
    return bins
