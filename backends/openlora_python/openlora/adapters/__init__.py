"""Adapters: what they are made of, which ones this server knows, and where their bytes lie."""
