"""The HTTP server measured through HTTP."""
