"""The catalog: one short module per method, found by its file name."""
