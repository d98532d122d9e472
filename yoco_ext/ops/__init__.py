"""The fused ops: thin functions over torch.ops.yoco_ext."""
