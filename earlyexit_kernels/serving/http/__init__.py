"""The HTTP server: requests and answers, the queue, and the processes that run the model."""
