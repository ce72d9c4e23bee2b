"""From a triplet to kept image pairs: Prompt-to-Prompt sampling and the CLIP filter (paper, section 3.1.2)."""
