"""What must hold: one file per family of properties. Importable as `harness.specs`."""
