"""Arithmetic on given buffers: the reference, torch, the compiled CPU library, Triton."""
