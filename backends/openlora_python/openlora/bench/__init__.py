"""`openlora bench`: how fast the engine answers, in process."""
