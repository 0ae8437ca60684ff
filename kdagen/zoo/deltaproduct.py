"""DeltaProduct (Siems et al., 2025, arXiv:2502.10297): one decay a token, then n delta steps.

Arguments are sequences: with n = 2 the op takes k_1, k_2, v_1, v_2, beta_1, beta_2.
"""

import kdagen as kg


def of_order(n: int):
    """The recurrence with n delta steps a token."""

    @kg.recurrence(name=f"deltaproduct{n}" if n != 2 else "deltaproduct")
    def deltaproduct(S, q, k: kg.Key[n], v: kg.Value[n], beta: kg.Scalar[n], g):
        """S_t = prod_i (I - beta_i k_i k_i^T) exp(g) S_{t-1} + what the steps write"""
        S = kg.exp(g) * S
        for k_i, v_i, beta_i in zip(k, v, beta, strict=True):
            S = S + kg.outer(k_i, beta_i * (v_i - S.T @ k_i))
        return S, S.T @ q

    return deltaproduct


deltaproduct = of_order(2)
