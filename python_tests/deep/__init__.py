"""Properties of the package on random input, valid and invalid; `make fuzz` runs them for as long as it is given."""
