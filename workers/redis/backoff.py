"""Exponential backoff: the wait doubles with each failure, with jitter so that workers do not retry in step."""

import random

_FIRST_S = 0.1
_LONGEST_S = 5.0
_DOUBLINGS = 6


def backoff_s(failures: int) -> float:
    """Return the wait after so many failures in a row.

    Args:
        failures: 1 after the first.

    Returns:
        Seconds: half to the whole of 0.1, 0.2, 0.4 and so on up to 5.
    """
    whole = min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, _DOUBLINGS))
    return whole * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
