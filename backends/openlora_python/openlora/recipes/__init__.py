"""Recipes of TensorRT-LLM engines: what a model needs on a GPU, whether it can work there, and the commands that make
it."""
