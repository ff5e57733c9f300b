"""Thin bridges to other people's frameworks; each imports its host only when it is used."""
