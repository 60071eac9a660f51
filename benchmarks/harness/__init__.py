"""What all experiments share: their definition, cells on disk, the driver, pages and charts."""
