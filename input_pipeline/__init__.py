"""From pixels on disk to batches, on the host. Imports neither jax nor flax nor mfl_jax."""
