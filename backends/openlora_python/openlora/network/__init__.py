"""The EVM side: contracts, what they say, and the transactions that move them."""
