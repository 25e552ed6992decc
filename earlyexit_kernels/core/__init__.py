"""How a batch runs: packing, the loop, traces, replay, fixed depth and seals."""
