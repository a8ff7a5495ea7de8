"""From receipts and chain events to who earned what: a total function in integers."""
