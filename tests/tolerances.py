"""Every parity tolerance, with its reason. Loosening one is a commit of its own."""

TOLERANCES: dict[str, tuple[float, str]] = {}
