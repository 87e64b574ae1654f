"""What is shown of lineages: figures."""
