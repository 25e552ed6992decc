"""Names of the servers that are compared."""

#: The same weights, of which no row leaves early; the model with its criterion; that behind LitServe.
FULL, OWN, LITSERVE = "full depth", "own exits", "own exits, LitServe"
