"""Many edits from a manifest, each done once whatever is killed on the way: the parts that know no cluster."""
