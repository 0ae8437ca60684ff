"""What kernels are built for: each purpose has kernels of its own, in a folder of its own."""

PURPOSES = ("inference", "training", "decode")


def without(purpose: str) -> str:
    """How to build the kernels of all other purposes, for messages."""
    return f"{' '.join(f'--only {other}' for other in PURPOSES if other != purpose)} builds without {purpose}"
