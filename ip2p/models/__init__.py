"""Loading weights and refusing those that must not be used."""
