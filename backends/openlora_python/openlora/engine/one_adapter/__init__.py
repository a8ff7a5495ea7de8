"""What engines share that take one adapter per request, known by an integer id.

Runs under the engine's own interpreter: imports the standard library, numpy and msgspec, and of ours only what needs no
more than these.
"""
