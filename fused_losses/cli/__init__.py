"""The commands of python -m fused_losses."""
