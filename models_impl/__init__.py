"""The networks of every family, in bare torch: configuration, model, sampling and checkpoint formats."""
