"""Attention of one new token of each sequence over its cache."""

from turboattention.ops.decode.paged import paged_decode
from turboattention.ops.decode.reference import decode_attention

__all__ = ["decode_attention", "paged_decode"]
