"""The demo: three models on real text, compared."""
