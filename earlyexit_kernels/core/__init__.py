"""How a batch runs: packing, the eager loop, fused layers, graphs, replay and fixed depth."""
