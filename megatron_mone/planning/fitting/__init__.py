"""How near to its peaks a device comes: fitted to profiles and to published runs."""
