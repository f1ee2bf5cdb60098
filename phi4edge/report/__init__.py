"""Results side by side: comparison, gates, JSON, Markdown, HTML."""
