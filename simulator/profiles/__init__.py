"""Performance profiles: files of them, published tables, and those that come with the package."""
