"""Seeds of all random streams, derived and never shared, so that a stream does not depend on what ran before it."""

import hashlib


def derive_seed(run_seed: int, purpose: str, *indices: int) -> int:
    """A seed in [0, 2^63) for one purpose, such as ("rollout", step); the same in every layout and after a resume."""
    text = ":".join([str(run_seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
