"""How fast the parts are on this machine; `python -m protoclip_jax.benchmark` prints it."""
