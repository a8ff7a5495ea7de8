"""OpenLoRA on Triton: many LoRA adapters over one base model, every answer attributed."""

__version__ = "0.1.0"
