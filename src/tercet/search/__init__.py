"""Vectors of many texts or images in files, and search among them."""

from tercet.search.index import Index

__all__ = ["Index"]
