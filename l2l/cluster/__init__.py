"""Several processes, one run: what JAX reads at its start, joining, agreeing, leaving."""
