"""Studies: files that say which runs an ablation compares. The paper's at full size, and small ones (``small_*``)."""
