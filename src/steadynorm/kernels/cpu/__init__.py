"""What the Numba backend is made of: vectors (simd), building and caching (build), kernels (planes, rows), memory."""
