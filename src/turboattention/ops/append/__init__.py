"""New K and V enter the cache: when a page is full it is compressed once, never again."""

from turboattention.ops.append.reference import compress_pages, full_pages, gather_sinks, real_tokens

__all__ = ["compress_pages", "full_pages", "gather_sinks", "real_tokens"]
