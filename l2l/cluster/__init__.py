"""One run in several processes: what JAX reads when it starts; joining, agreeing and leaving."""
