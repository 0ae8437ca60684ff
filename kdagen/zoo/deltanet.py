"""DeltaNet (Schlag et al., 2021, arXiv:2102.11174; parallel form: Yang et al., 2024, arXiv:2406.06484)."""

import kdagen as kg


@kg.recurrence
def deltanet(S, q, k, v, beta):
    """S_t = (I - beta k k^T) S_{t-1} + beta k v^T"""
    S = S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q
