"""C++ kernels for CPUs behind a plain C interface: an optional library that knows pages and raw memory, not caches."""
