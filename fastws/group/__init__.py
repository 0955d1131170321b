"""The whole group of changes to the weights of an architecture that leave its function as it is."""

from fastws.group.group import Group

__all__ = ["Group"]
