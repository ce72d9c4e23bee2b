"""Serving edits: the web application (no Ray), its Ray Serve deployment and its page."""
