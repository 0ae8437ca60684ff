"""Executes generated GPU programs on the CPU: what they compute, and whether their synchronisation holds."""
