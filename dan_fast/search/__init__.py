"""Searching for persons in a gallery of any size: all compared, or by an index of faiss."""

from dan_fast.search.gallery_index import GalleryIndex, Update, update_index
from dan_fast.search.searcher import Found

__all__ = ["Found", "GalleryIndex", "Update", "update_index"]
