"""Device code: functions of triton.jit alone. Imported when a kernel is first launched."""
