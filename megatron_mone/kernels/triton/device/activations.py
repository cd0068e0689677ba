"""Device functions: the gate activation sigma and its derivative, in float32.

Contract: a is float32. sigma(NaN) is NaN; relu's derivative is 0 at and below 0, gelu is by erf:
as torch's. KIND is one of ACTIVATIONS.
"""

import triton
import triton.language as tl


@triton.jit
def sigma(a, KIND: tl.constexpr):
    """sigma(a)."""
    tl.static_assert(
        KIND == "silu" or KIND == "sigmoid" or KIND == "gelu" or KIND == "relu"
        or KIND == "squared_relu"
    )  # fmt: skip
    if KIND == "silu":
        g = a * tl.sigmoid(a)
    elif KIND == "sigmoid":
        g = tl.sigmoid(a)
    elif KIND == "gelu":
        g = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    else:
        g = tl.where(a < 0.0, 0.0, a)
        if KIND == "squared_relu":
            g = g * g
    return g


@triton.jit
def sigma_prime(a, KIND: tl.constexpr):
    """d sigma / d a."""
    if KIND == "silu":
        s = tl.sigmoid(a)
        d = s * (1.0 + a * (1.0 - s))
    elif KIND == "sigmoid":
        s = tl.sigmoid(a)
        d = s * (1.0 - s)
    elif KIND == "gelu":
        phi = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        d = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * phi
    elif KIND == "squared_relu":
        d = tl.where(a <= 0.0, 0.0, 2.0 * a)
    else:
        d = tl.where(a <= 0.0, 0.0, 1.0)
    return d
