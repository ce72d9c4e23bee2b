"""What may be wrong on a machine, found before anything starts, each with its remedy."""
