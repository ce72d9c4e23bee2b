"""Measures: what postcards allow to be known exactly, read off pictures by the attribute reader."""
