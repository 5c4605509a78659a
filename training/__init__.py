"""What trained the demo model. See training/README.md."""
