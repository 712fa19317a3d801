"""Stores that own the bytes of a key/value cache; they compute no attention."""

from turboattention.kvcache.contiguous import LayerCache

__all__ = ["LayerCache"]
