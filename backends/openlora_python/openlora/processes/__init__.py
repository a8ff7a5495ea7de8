"""Processes that depend on one another: kept alive, asked over a socket, ended with their parent; lock files."""
