"""Pairs of pictures and captions, from files to batches."""
