"""Thin Ray shells over ``ip2p``: each file is one job that ``ray job submit`` can run."""
