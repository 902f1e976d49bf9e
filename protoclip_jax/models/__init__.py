"""CLIP with prototypes: models, in JAX."""
