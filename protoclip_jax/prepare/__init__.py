"""Pairs made ready for training: downloaded, checked and converted, described."""
