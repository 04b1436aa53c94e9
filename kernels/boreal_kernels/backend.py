"""Which implementation of an operation runs.

A request is a name or "auto". A name is a promise: it runs as named or raises, it never becomes something else.
"""

BACKENDS = {  # op -> implementations, best first
    "gated_delta_rule": ("torch",),
    "causal_conv1d": ("torch",),
    "gated_rmsnorm": ("torch",),
    "multi_hot_cross_entropy": ("torch",),
    "linear_multi_hot_cross_entropy": ("torch",),
    "bag_embedding": ("torch",),
}


def resolve(backend: str, op: str) -> str:
    """The implementation of `op` that `backend` stands for; ValueError if there is none of that name."""
    if op not in BACKENDS:
        raise ValueError(f"op: found {op!r}, expected one of {', '.join(BACKENDS)}")
    present = BACKENDS[op]
    if backend == "auto":
        return present[0]
    if backend not in present:
        raise ValueError(f"{op}: backend: found {backend!r}, expected one of auto, {', '.join(present)}")
    return backend
