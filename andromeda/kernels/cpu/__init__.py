"""Kernels in C++ for texts that are being written on a CPU, where a C++ compiler is found; float32."""
