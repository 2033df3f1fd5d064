"""Bytes on disk: radiographs as WebDataset shards, written with an index and read by a plan."""
