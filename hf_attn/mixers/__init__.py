"""Token mixers that are no attention functions of queries, keys, values and a mask."""
