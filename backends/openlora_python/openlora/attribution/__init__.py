"""Attribution: the usage journal, receipts and the receipt log."""
