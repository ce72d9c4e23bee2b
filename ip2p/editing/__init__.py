"""Editing pictures by instruction: guidance, sizes, and the editor that puts them together."""
