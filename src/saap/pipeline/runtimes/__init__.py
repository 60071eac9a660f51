"""Programs that compute a model where its speed is measured, one module each."""
