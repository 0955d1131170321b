"""Damages done to what files hold."""

import copy

VALUES = (-1, 0, 1, 7, 2**40, 2**70, 2.5, "x", "../x", None, True, [], [1], {})


def places(tree, path=()):
    """The way to each value in nested lists and dictionaries."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def damaged(tree):
    """Copies of a tree in which one value is another, or missing."""
    for path in list(places(tree))[1:]:
        for value in (*VALUES, "remove"):
            copied = copy.deepcopy(tree)
            parent = copied
            for key in path[:-1]:
                parent = parent[key]
            if value == "remove":
                del parent[path[-1]]
            elif parent[path[-1]] == value and type(parent[path[-1]]) is type(value):
                continue
            else:
                parent[path[-1]] = value
            yield path, value, copied
