"""The OpenAI-compatible gateway: HTTP in front of the ensemble, in a process of its own."""
