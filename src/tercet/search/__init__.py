"""Vectors of many texts or images in files, and search among them."""

from tercet.search.encoding import encode_index, encode_to
from tercet.search.index import Index
from tercet.search.lexical import BM25, reciprocal_rank_fusion, search_hybrid
from tercet.search.signature import check_same_model
from tercet.search.vectors import Vectors, open_vectors

__all__ = [
    "BM25", "Index", "Vectors", "check_same_model", "encode_index", "encode_to", "open_vectors", "reciprocal_rank_fusion",
    "search_hybrid",
]  # fmt: skip
