"""New K and V enter the cache: when a page is full it is compressed once, never again."""

from turboattention.ops.append.reference import add_query_power, compress_pages, full_pages, gather_sinks, real_tokens

__all__ = ["add_query_power", "compress_pages", "full_pages", "gather_sinks", "real_tokens"]
