"""U-Nets and pipelines (being written)."""
