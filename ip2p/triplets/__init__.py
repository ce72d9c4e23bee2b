"""Captions to triplets (paper, section 3.1): read captions, ask a writer, keep what passes the rules."""
