"""Running packed models: the layers, loading, measuring."""
