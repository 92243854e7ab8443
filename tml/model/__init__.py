"""The network as free functions over pytrees: `specs(cfg)`, `apply(params, batch, cfg)`, `step(params, state, …)`."""
