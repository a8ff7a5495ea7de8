"""The page that people look at: a node's receipts, adapters and settlement, and a verifier that runs in the browser."""
