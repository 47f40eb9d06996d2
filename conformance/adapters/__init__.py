"""One module for each project whose caches are compared: `VERSIONS` and `implementations(vectors)`."""
