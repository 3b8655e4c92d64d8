"""The distillation loss: its plain form, its fused form, and the kernels."""
