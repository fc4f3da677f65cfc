"""The kernels: the loader of the native library and, in ``triton``, the Triton kernels. Nothing here imports upward."""
