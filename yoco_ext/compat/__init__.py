"""The kernels of this package under the names and signatures of other code bases: flash_attn, unilm, fla, hf."""
