"""Makes the harness's own pytest options known where the package is not installed."""

pytest_plugins = ["harness.plugin"]
