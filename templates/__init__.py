"""Kernel skeletons: loop nests, memory movement and pipelining; no mathematics."""
